"""Host memory on the way to a device: used again, known to the driver until the end."""

import jax
import numpy as np
import pytest

from jaxquant.checkpoint.buffers import HostBuffers


class Client:
    """A driver that keeps account."""

    def __init__(self):
        self.mapped, self.most = {}, 0

    def dma_map(self, address, size):
        self.mapped[address] = size
        self.most = max(self.most, len(self.mapped))

    def dma_unmap(self, address):
        del self.mapped[address]


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def test_a_cpu_device_keeps_the_memory_it_is_given():
    with HostBuffers(100) as buffers, buffers.take() as buffer:
        assert buffer is None


def test_buffers_are_used_again_and_mapped_while_they_are(accelerator):
    buffers, client = HostBuffers(5000), Client()
    buffers._client = client
    with buffers:
        for _ in range(3):
            with buffers.take() as a, buffers.take() as b:
                assert a is not None
                assert b is not None
                assert a.nbytes == b.nbytes >= 5000
                assert not np.shares_memory(a, b)
                a[:], b[:] = 1, 2
                assert client.mapped == {x.ctypes.data: x.nbytes for x in (a, b)}
        assert client.most == 2
    assert not client.mapped


def test_a_buffer_comes_back_after_an_error(accelerator):
    with HostBuffers(1) as buffers:
        with pytest.raises(ValueError, match="read"), buffers.take() as first:
            raise ValueError("read")
        with buffers.take() as again:
            assert again is first


def test_a_platform_that_maps_nothing_still_uses_them_again(accelerator):
    with HostBuffers(1) as buffers:  # as XLA:CPU's client
        with buffers.take() as first:
            assert first is not None
            first[:] = 1
        with buffers.take() as again:
            assert again is first
