"""Host memory that slabs pass through on their way to a device."""

import contextlib
import mmap
import queue
from collections.abc import Iterator
from typing import Self

import jax
import numpy as np


class HostBuffers:
    """Buffers that are used again and again, one for each thread at most.

    Fresh memory costs a page fault every 4 KB, and memory that the driver does not know is copied
    into some that it does before the device can fetch it: of an H200's 55 GB/s that leaves half.

    Args:
      nbytes: of a buffer.
    """

    def __init__(self, nbytes: int):
        self._nbytes = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        # A CPU device keeps the memory it is given, so each slab has its own there.
        self._reused = jax.default_backend() != "cpu" and nbytes > 0
        self._free: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        self._mapped: list[np.ndarray] = []
        self._client = jax.local_devices()[0].client

    @contextlib.contextmanager
    def take(self) -> Iterator[np.ndarray | None]:
        """Bytes for a slab, or None if it is to have memory of its own.

        The device has to have read them when the block ends.
        """
        if not self._reused:
            yield None
            return
        try:
            buffer = self._free.get_nowait()
        except queue.Empty:
            buffer = self._make()
        try:
            yield buffer
        finally:
            self._free.put(buffer)

    def _make(self) -> np.ndarray:
        memory = mmap.mmap(-1, self._nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        buffer = np.frombuffer(memory, np.uint8)
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # not every platform can
            self._client.dma_map(buffer.ctypes.data, buffer.nbytes)
            self._mapped.append(buffer)
        return buffer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for buffer in self._mapped:
            self._client.dma_unmap(buffer.ctypes.data)
        self._mapped.clear()
