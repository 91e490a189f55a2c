"""Measured configs of the kernels, as data, and how to measure more.

`tuned.json` beside this file is what was measured for the GPUs of the benchmarks. A user's own
table, made by `tune`, comes before it. Both are

    {"NVIDIA H200": {"gemm": {"512x4096x14336": {"tile_m": 128, "cluster": false, "tile_n": 128}}}}

by device kind, kernel (`gemm`, `decode` or `w8a16`), and MxNxK with M as `bucket` rounds it. What
is in neither is left to the kernel's prediction.
"""

import dataclasses
import functools
import importlib
import json
import os
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.errors import JaxquantError

_SHIPPED = Path(__file__).with_name("tuned.json")
_KERNELS = ("gemm", "decode", "w8a16")

# A config of `gemm` is measured if it is predicted to take at most so many times the least.
_WITHIN = 1.25
_REPEATS = 5
# Together the operands exceed any L2 cache.
_ROTATED_BYTES = 200 << 20
_MAX_SETS = 6

Table = dict[str, dict[str, dict[str, dict[str, Any]]]]


def user_table() -> Path:
    """The user's table: `$JAXQUANT_TUNED`, or `jaxquant/tuned.json` in the user's cache."""
    if path := os.environ.get("JAXQUANT_TUNED"):
        return Path(path)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "jaxquant" / "tuned.json"


def bucket(M: int) -> int:
    """M rounded up by less than a quarter: two shapes of one bucket are tuned as one."""
    step = 1 << max(3, M.bit_length() - 3)
    return -(-M // step) * step


def lookup(kernel: str, M: int, N: int, K: int) -> dict[str, Any] | None:
    """The fields of the tuned config on this process's device, or None.

    Raises:
      JaxquantError: a table that is not what the module's docstring says; names file and field.
    """
    environment = os.environ.get("JAXQUANT_TUNED"), os.environ.get("XDG_CACHE_HOME")
    return _configs(kernel, environment).get(f"{bucket(M)}x{N}x{K}")


@functools.cache
def _configs(kernel: str, environment: Any) -> dict[str, dict[str, Any]]:
    """Both tables' configs of a kernel on this device, the user's first."""
    del environment  # what `user_table` looks at
    tables = (_load(path) for path in (_SHIPPED, user_table()))
    of_kernel = (table.get(_device_kind(), {}).get(kernel, {}) for table in tables)
    return functools.reduce(dict.__or__, of_kernel)


def _device_kind() -> str:
    return jax.devices()[0].device_kind


def _load(path: Path) -> Table:
    """Reads and checks a table; one that does not exist is empty."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    except OSError as e:
        raise JaxquantError(f"{path}: {e.strerror}") from None
    try:
        table = json.loads(text)
    except json.JSONDecodeError as e:
        raise JaxquantError(
            f"{path}: not JSON ({e}); mend it, or remove it and tune again"
        ) from None
    _check(path, table)
    return table


def _check(path: Path, table: Any) -> None:
    def refuse(field: str, came: Any, allowed: str) -> None:
        where = f" {field}:" if field else ""
        raise JaxquantError(f"{path}:{where} {came!r}; allowed: {allowed}")

    def entries(field: str, value: Any, keys: str) -> Iterable[tuple[str, str, Any]]:
        if not isinstance(value, dict):
            refuse(field, value, f"an object keyed by {keys}")
        return [(f"{field}/{key}" if field else key, key, v) for key, v in value.items()]

    for device, _, kernels in entries("", table, "device kind"):
        for field, kernel, shapes in entries(device, kernels, "kernel"):
            if kernel not in _KERNELS:
                refuse(field, kernel, ", ".join(_KERNELS))
            module = _module(kernel)
            fields: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(module.Config)}
            for shape, key, config in entries(field, shapes, "MxNxK"):
                sizes = key.split("x")
                if len(sizes) != 3 or not all(s.isdecimal() and int(s) for s in sizes):
                    refuse(shape, key, "MxNxK")
                if not isinstance(config, dict) or set(config) != set(fields):
                    refuse(shape, config, f"an object of {', '.join(fields)}")
                for name, kind in fields.items():
                    if type(config[name]) is not kind:
                        refuse(f"{shape}/{name}", config[name], f"{kind.__name__}s")
                try:
                    cut = module.Config(**config)
                except JaxquantError as e:
                    raise JaxquantError(f"{path}: {shape}: {e}") from None
                if kernel != "gemm" and cut not in (cuts := module.cuts(*map(int, sizes))):
                    allowed = (json.dumps(dataclasses.asdict(cut)) for cut in cuts)
                    refuse(shape, config, ", ".join(allowed))


def _module(kernel: str) -> Any:
    # When it is needed: Mosaic GPU is there only where jaxlib was built with it.
    return importlib.import_module(f"jaxquant.matmul.{kernel}_sm90")


def tune(
    shapes: Iterable[tuple[int, int, int]], *, weight_only: bool = False
) -> dict[tuple[int, int, int], dict[Any, float]]:
    """Measures the configs of kernels on this GPU and adds the fastest to the user's table.

    Products that are compiled from then on take them. Operands are random. A product of so few
    tokens that it is one kernel with their quantization has one config, and is left out.

    Args:
      shapes: (M, N, K) of the products; M tokens, as many as are to be prefilled or decoded at
        once.
      weight_only: whether activations stay BF16.

    Returns:
      By shape, the microseconds of each config that was measured (device time of the kernel),
      the fastest first.

    Raises:
      JaxquantError: the device is no Hopper GPU, or the user's table cannot be read or written.
    """
    device = jax.devices()[0]
    if device.platform != "gpu" or not str(device.compute_capability).startswith("9."):
        raise JaxquantError(f"tune: the device is {device.device_kind}; allowed: Hopper GPUs")
    path = user_table()
    _load(path)  # a table with an error is not to be found out at the end
    measured = {}
    for M, N, K in shapes:
        kernel = _kernel(M, N, K, device.core_count, weight_only)
        if kernel is None:
            continue
        measured[M, N, K] = times = _measure(kernel, M, N, K, device.core_count)
        table = json.loads(path.read_text()) if path.exists() else {}
        configs = table.setdefault(device.device_kind, {}).setdefault(kernel, {})
        configs[f"{bucket(M)}x{N}x{K}"] = dataclasses.asdict(next(iter(times)))
        _write(path, table)
    return measured


def _write(path: Path, table: Table) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(table, indent=1) + "\n")
        temporary.replace(path)
    except OSError as e:
        raise JaxquantError(f"{path}: {e.strerror}; set JAXQUANT_TUNED to another path") from None
    _configs.cache_clear()


def _kernel(M: int, N: int, K: int, sms: int, weight_only: bool) -> str | None:
    """The kernel of a product, as `mosaic_gpu` picks it, if it has configs to choose from."""
    if weight_only:
        return "w8a16"
    if _module("gemv").takes(M, K):
        return None
    return "decode" if _module("decode").takes(M, N, sms) else "gemm"


def _measure(kernel: str, M: int, N: int, K: int, sms: int) -> dict[Any, float]:
    """Microseconds by config, the fastest first."""
    from jax.experimental.mosaic.gpu import profiler

    from jaxquant.matmul.sm90 import FP8, round_up

    module = _module(kernel)
    args: dict[str, Any] = {"out_dtype": jnp.bfloat16, "sms": sms}
    if kernel == "gemm":
        run, rows = module.gemm, max(16, round_up(M, 8))
        predicted = {c: module.microseconds(c, M, N, K, sms) for c in module.PREDICTED}
        most = _WITHIN * min(predicted.values())
        configs = [config for config, us in predicted.items() if us <= most]
    elif kernel == "decode":
        run, rows, configs = module.decode, module.padded_tokens(M), module.cuts(M, N, K)
        args["M"] = M
    else:
        run, rows, configs = module.product, M if M < 8 else round_up(M, 8), module.cuts(M, N, K)
    sets = max(2, min(_MAX_SETS, _ROTATED_BYTES // (N * K)))

    @jax.jit
    def make(key):
        x_key, w_key = jax.random.split(key)
        x = jax.random.normal(x_key, (rows, K), jnp.bfloat16) * 100
        w = jax.random.normal(w_key, (1, N, K), jnp.bfloat16) * 100
        return x if kernel == "w8a16" else x.astype(FP8), w.astype(FP8)

    operands = [make(jax.random.key(i)) for i in range(sets)]
    sx = () if kernel == "w8a16" else (jnp.full((-(-K // 128), round_up(M, 64)), 1e-2),)
    sw = jnp.full((1, -(-N // 128), -(-K // 128)), 1e-2)
    layer = jnp.zeros(1, jnp.int32)

    def products(config):
        def all_sets(operands):
            return [run(x, *sx, w, sw, layer, config=config, **args) for x, w in operands]

        return jax.jit(all_sets)

    times: dict[Any, float] = {}
    for config in configs:
        measure: Any = profiler.Cupti(finalize=False).measure
        _, milliseconds = measure(products(config), iterations=_REPEATS)(operands)
        if not milliseconds:
            raise JaxquantError("tune: CUPTI saw no kernels; allowed: no other profiler at work")
        times[config] = statistics.median(milliseconds) * 1e3 / sets
    return dict(sorted(times.items(), key=lambda item: item[1]))
