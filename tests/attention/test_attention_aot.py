"""The Hopper kernel compiles for an H200, on a machine that has no GPU.

Needs what `tests/matmul/test_aot.py` needs.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not find_spec("jax_cuda13_plugin"), reason="needs jax-cuda13-plugin, to compile for a GPU"
)

# B, H, G, S, D, window, softcap
SHAPES = [
    (1, 8, 4, 1536, 128, None, None),  # in clusters of 8
    (1, 8, 4, 32768, 128, None, None),  # in larger tiles
    (64, 8, 4, 1536, 128, None, None),
    (3, 32, 1, 1000, 64, 100, None),
    (2, 4, 5, 1000, 80, None, None),
    (2, 32, 1, 4096, 96, 2048, None),
    (1, 4, 2, 4096, 256, 1024, 50.0),
    (1, 1, 64, 4096, 128, None, None),
    (1, 1, 64, 4096, 256, None, None),
]


@pytest.fixture(scope="module")
def compiled():
    """The program of each shape. From another process: the plugin looks for a GPU in this one."""
    path = os.pathsep.join(sys.path)
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    command = [sys.executable, __file__, json.dumps(SHAPES)]
    process = subprocess.run(command, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout)


@pytest.mark.parametrize(("shape", "i"), [(s, i) for i, s in enumerate(SHAPES)])
def test_attention_compiles_and_copies_no_cache(compiled, shape, i):
    assert "jaxquant_decode_attention" in compiled[i]
    B, H, _, S, D, *_ = shape
    assert f"bf16[{B},{H},{S},{D}]" not in compiled[i]
    assert not [line for line in compiled[i].splitlines() if "copy(" in line]


def compile_for_h200(shapes: list) -> list[str | None]:
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from jaxquant.attention import decode_attention, mosaic_gpu

    mosaic_gpu.multiprocessors = lambda q, what: 132
    spec = (Path(__file__).parents[1] / "matmul" / "h200.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=spec, topology="1x1x1")
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def compile_shape(B, H, G, S, D, window, softcap):
        def attend(q, k, v, layer, lengths):
            return decode_attention(
                q, k, v, layer, lengths, window=window, softcap=softcap, implementation="mosaic_gpu"
            )

        cache = (2, B, H, S, D), jnp.bfloat16
        operands = [((B, H * G, D), jnp.bfloat16), cache, cache, ((), "int32"), ((B,), "int32")]
        args = [jax.ShapeDtypeStruct(*o, sharding=replicated) for o in operands]
        return jax.jit(attend).lower(*args).compile().as_text()

    return [compile_shape(*s) for s in shapes]


if __name__ == "__main__":
    print(json.dumps(compile_for_h200(json.loads(sys.argv[1]))))
