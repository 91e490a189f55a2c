"""How far a load or an export is, for the eye while it runs and as a Timing when it is done."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Self

from tqdm import tqdm

from jaxquant.report import Timing


class Progress:
    """A bar over bytes, and seconds per stage summed over threads.

    Args:
      title: what is done to what, for the bar.
      total: bytes to read.
      show: whether to show the bar; None shows it on a terminal.
    """

    def __init__(self, title: str, total: int, show: bool | None = None):
        self._bar = tqdm(
            total=total,
            unit="B",
            unit_scale=True,
            desc=title,
            disable=None if show is None else not show,
            leave=False,
        )
        self._nbytes = 0
        self._stages: dict[str, float] = {}
        self._lock = threading.Lock()
        self._start = time.perf_counter()

    def advance(self, nbytes: int, what: str) -> None:
        """Counts bytes that are done, and shows what they were."""
        self._nbytes += nbytes
        self._bar.set_postfix_str(what, refresh=False)
        self._bar.update(nbytes)

    def skip(self, nbytes: int) -> None:
        """Moves the bar over what was done before."""
        self._bar.initial = self._bar.n + nbytes  # from where the rate is counted
        self._bar.update(nbytes)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time that its block takes to a stage; any thread may."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        with self._lock:
            self._stages[name] = self._stages.get(name, 0.0) + seconds

    def timing(self) -> Timing:
        """What it took so far."""
        seconds = time.perf_counter() - self._start
        return Timing(seconds, self._nbytes, dict(self._stages), _peak_memory())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.close()


def _peak_memory() -> int | None:
    """The highest resident size of the process so far, in bytes; None where it is not known."""
    if sys.platform not in ("linux", "darwin"):
        return None
    import resource

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024
