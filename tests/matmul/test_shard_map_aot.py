"""Two H200s inside shard_map: each multiplies its part of the weight; see `tests/hopper.py`."""

import json
import re

import pytest
from hopper import h200s, needs_plugin, run_apart

pytestmark = needs_plugin

M, K = 8, 4096


@pytest.fixture(scope="module")
def compiled():
    return run_apart(__file__)


def test_each_device_multiplies_its_part_where_it_lies(compiled):
    weights = set(re.findall(r"f8e4m3fn\[\d{4},\d{4}\]", compiled))
    assert weights == {f"f8e4m3fn[{K // 2},{K}]", f"f8e4m3fn[{K},{K // 2}]"}
    assert "jaxquant_decode_fp8" in compiled
    assert "all-reduce" in compiled
    assert "all-gather" not in compiled


def compile_all() -> str:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxquant.array import QuantizedArray
    from jaxquant.matmul import matmul

    mesh = h200s(2)
    rows, columns = PartitionSpec("x"), PartitionSpec(None, "x")

    def shaped(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def weight(spec):
        qvalue = shaped((K, K), jnp.float8_e4m3fn, spec)
        scale = shaped((K // 128, K // 128), jnp.float32, spec)
        return QuantizedArray(qvalue, scale, (128, 128), np.dtype(jnp.bfloat16))

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
    x = shaped((M, K), jnp.bfloat16, PartitionSpec())
    return jax.jit(sharded).lower(x, weight(rows), weight(columns)).compile().as_text()


if __name__ == "__main__":
    print(json.dumps(compile_all()))
