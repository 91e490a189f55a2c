"""Which devices the kernels run on."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxquant import hopper


@dataclasses.dataclass(frozen=True)
class Device:
    platform: str
    device_kind: str
    compute_capability: str
    core_count: int = 132


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        (
            Device("gpu", "NVIDIA L4", "8.9"),
            "mosaic_gpu: NVIDIA L4 has compute capability 8.9; the kernels are for 9.0 (Hopper)",
        ),
        (Device("gpu", "NVIDIA H200", "9.0"), None),
    ],
)
def test_which_gpus_kernels_run_on(monkeypatch, device, reason):
    monkeypatch.setattr(hopper, "_device", lambda x: device)
    if reason is None:
        assert hopper.multiprocessors(None, "products") == 132
    else:
        with pytest.raises(NotImplementedError) as caught:
            hopper.multiprocessors(None, "products")
        assert str(caught.value) == reason


def test_the_default_device_is_the_one_that_counts():
    x, devices = np.ones((2, 128), np.float32), jax.devices()
    assert hopper._device(jax.device_put(x, devices[-1])) == devices[-1]
    with jax.default_device(devices[-1]):
        traced = []
        jax.jit(lambda x: traced.append(hopper._device(x)))(np.ones(2))
        assert traced == [devices[-1]]
