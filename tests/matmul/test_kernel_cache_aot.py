"""Programs of kernels that were kept are those of the kernels themselves; see `tests/hopper.py`."""

import json
import re
from collections import Counter

import pytest
from hopper import h200s, needs_plugin, run_apart

pytestmark = needs_plugin

CASES = ["product", "gated MLP", "rows", "columns", "append"]
M, K, N = 16, 2048, 4096


@pytest.fixture(scope="module")
def compiled():
    return run_apart(__file__)


@pytest.mark.parametrize("case", CASES)
def test_the_same_program_is_compiled(compiled, case):
    (lowered, expected), (kept, program), (read, again) = compiled[case]
    assert "mosaic_gpu_v2" in expected
    assert set(lowered) >= set(kept)  # cases may share some
    assert kept
    assert not read
    assert operations(expected) == operations(program) == operations(again)


def operations(program: str) -> Counter:
    """What is computed of which shapes, and what is written in place."""
    found = r"= (\S+|\(.*?\)) ([\w-]+)\("
    aliased = re.findall(r"output_to_operand_aliasing=\S+", program)
    return Counter([*re.findall(found, program), *aliased])


def compile_all() -> dict[str, list]:
    import tempfile

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax._src.pallas.mosaic_gpu import lowering
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxquant.array import QuantizedArray
    from jaxquant.attention import append_and_attend
    from jaxquant.attention.cache import quantize_keys, quantize_values
    from jaxquant.matmul import RMSNorm, SiluMul, gated_mlp, kernel_cache, matmul

    one, two = h200s(1), h200s(2)
    kernels, lower = [], lowering.lower_jaxpr_to_module

    def recording(*args, **kwargs):
        result = lower(*args, **kwargs)
        text = str(result.module.operation.get_asm(enable_debug_info=False))
        kernels.append(re.sub(r'dump_basename = "[^"]*"', "", text))  # has a number of the process
        return result

    lowering.lower_jaxpr_to_module = recording

    def shaped(mesh, shape, dtype, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def weight(mesh, N, K, *spec):
        qvalue = shaped(mesh, (N, K), jnp.float8_e4m3fn, *spec)
        scale = shaped(mesh, (N // 128, K // 128), jnp.float32, *spec)
        return QuantizedArray(qvalue, scale, (128, 128), np.dtype(jnp.bfloat16))

    def mlp(x, norm, gate_up, down):
        around = {"prologue": RMSNorm(norm, 1e-5), "activation": SiluMul(), "residual": x}
        return gated_mlp(x, gate_up, down, **around)

    def append(qkv, k, v, lengths, *rotation):
        k, v = quantize_keys(k), quantize_values(v)
        return append_and_attend(qkv, k, v, 0, lengths, rotation)

    x = shaped(one, (M, K), jnp.bfloat16)
    both = shaped(two, (M, K), jnp.bfloat16)
    cache = shaped(one, (1, 2, 4, 512, 128), jnp.bfloat16)
    lengths, pairs = shaped(one, (2,), jnp.int32), shaped(one, (2, 64), jnp.float32)
    norm, qkv = shaped(one, (K,), jnp.bfloat16), shaped(one, (2, 16, 128), jnp.bfloat16)
    cases = {
        "product": (matmul, x, weight(one, N, K)),
        "gated MLP": (mlp, x, norm, weight(one, 2 * N, K), weight(one, K, N)),
        "rows": (matmul, both, weight(two, N, K, "x")),
        "columns": (matmul, both, weight(two, N, K, None, "x")),
        "append": (append, qkv, cache, cache, lengths, pairs, pairs),
    }

    def compile_case(run, *args) -> tuple[list[str], str | None]:
        """The kernels that are lowered, and the program."""
        jax.clear_caches()
        kernel_cache._calls.clear()  # as in another process
        kernels.clear()
        text = jax.jit(run).lower(*args).compile().as_text()
        return [*kernels], text

    found = {case: [compile_case(*arguments)] for case, arguments in cases.items()}
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        for case, arguments in cases.items():
            found[case] += [compile_case(*arguments) for _ in range(2)]
    return found


if __name__ == "__main__":
    print(json.dumps(compile_all()))
