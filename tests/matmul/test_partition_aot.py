"""Two H200s: each multiplies its part of the weight; see `tests/hopper.py`."""

import json
import re

import pytest
from hopper import h200s, needs_plugin, run_apart

pytestmark = needs_plugin

M, K = 8, 4096


@pytest.fixture(scope="module")
def compiled():
    return run_apart(__file__)


@pytest.mark.parametrize(
    ("case", "kernel"),
    [("shard_map", "decode_fp8"), ("jit", "decode_fp8"), ("jit, weight-only", "w8a16")],
)
def test_each_device_multiplies_its_part_where_it_lies(compiled, case, kernel):
    weights = set(re.findall(r"f8e4m3fn\[\d{4},\d{4}\]", compiled[case]))
    assert weights == {f"f8e4m3fn[{K // 2},{K}]", f"f8e4m3fn[{K},{K // 2}]"}
    assert f"jaxquant_{kernel}" in compiled[case]
    assert "all-reduce" in compiled[case]
    assert "all-gather" not in compiled[case]


def test_experts_stay_where_they_are(compiled):
    text = compiled["experts"]
    assert "jaxquant_grouped_fp8" in text
    assert "all-reduce" in text
    assert not re.search(r"f8e4m3fn\S* all-gather|u8\S* all-gather", text)


def compile_all() -> dict[str, str | None]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxquant.array import QuantizedArray
    from jaxquant.matmul import SiluMul, grouped_matmul, matmul

    mesh = h200s(2)
    rows, columns = PartitionSpec("x"), PartitionSpec(None, "x")

    def shaped(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def weight(spec, scheme: str | None = "dynamic"):
        qvalue = shaped((K, K), jnp.float8_e4m3fn, spec)
        scale = shaped((K // 128, K // 128), jnp.float32, spec)
        return QuantizedArray(qvalue, scale, (128, 128), np.dtype(jnp.bfloat16), scheme)

    def mlp(x, up, down):
        h = matmul(x, up)
        return jax.lax.psum(matmul(h, down, preferred_element_type=jnp.float32), "x")

    sharded = jax.shard_map(
        mlp,
        mesh=mesh,
        in_specs=(PartitionSpec(), rows, columns),
        out_specs=PartitionSpec(),
        check_vma=False,
    )

    def plain(x, up, down):
        return matmul(matmul(x, up), down, preferred_element_type=jnp.float32)

    def of_experts(x, up, down, sizes):
        return grouped_matmul(grouped_matmul(x, up, sizes), down, sizes, prologue=SiluMul())

    def experts(spec, N, K):
        qvalue = shaped((E, N, K), jnp.float8_e4m3fn, PartitionSpec(None, *spec))
        scale = shaped((E, N // 128, K // 128), jnp.float32, PartitionSpec(None, *spec))
        return QuantizedArray(qvalue, scale, (128, 128), np.dtype(jnp.bfloat16))

    E, sizes = 4, shaped((4,), jnp.int32, PartitionSpec())
    x = shaped((M, K), jnp.bfloat16, PartitionSpec())
    cases = {
        "shard_map": (sharded, weight(rows), weight(columns)),
        "jit": (plain, weight(rows), weight(columns)),
        "jit, weight-only": (plain, weight(rows, None), weight(columns, None)),
        "experts": (of_experts, experts(rows, 2 * K, K), experts(columns, K, K), sizes),
    }
    return {
        case: jax.jit(run).lower(x, *rest).compile().as_text()
        for case, (run, *rest) in cases.items()
    }


if __name__ == "__main__":
    print(json.dumps(compile_all()))
