"""Which device a kernel would run on, and whether it is a Hopper GPU."""

import functools
import logging
from typing import Any

import jax
from jax._src import config as jax_config
from jax.core import Tracer

_logger = logging.getLogger(__name__)


def multiprocessors(x: Any, what: str) -> int:
    """Multiprocessors of the Hopper GPU on which an operation of x will run.

    Args:
      x: an array, possibly traced.
      what: the operation, for the log.

    Raises:
      NotImplementedError: the device is another; logged once.
    """
    device = _device(x)
    if device.platform != "gpu":
        reason = f"mosaic_gpu: the device is a {device.platform}; the kernels are for Hopper GPUs"
    elif not str(device.compute_capability).startswith("9."):
        reason = (
            f"mosaic_gpu: {device.device_kind} has compute capability {device.compute_capability}; "
            "the kernels are for 9.0 (Hopper)"
        )
    else:
        return device.core_count
    _log_once(f"{reason}: {what} run through XLA")
    raise NotImplementedError(reason)


def interpreted() -> bool:
    """Whether Pallas' interpreter is to run kernels, on a CPU."""
    # No public name says so.
    mode = getattr(jax_config, "pallas_tpu_interpret_mode_context_manager", None)
    return mode is not None and mode.value is not None


def _device(x: Any) -> Any:
    if isinstance(x, jax.Array) and not isinstance(x, Tracer):
        return next(iter(x.devices()))
    # What is traced says nothing of its device: take the one that jit takes.
    default = jax.config.jax_default_device
    if isinstance(default, str):
        return jax.devices(default)[0]
    return jax.devices()[0] if default is None else default


@functools.cache
def _log_once(message: str) -> None:
    _logger.info(message)
