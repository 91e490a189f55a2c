"""The Hopper kernels compile for an H200, on a machine that has no GPU.

Needs jax's CUDA plugin of jax's own version, and nothing of CUDA besides:
`pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt`. `h200.txtpb` is what XLA's
`specs/h200.txtpb` says of the GPU.
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

# M, N, K, x, y, and the kernel that multiplies
PRODUCTS = [
    (1, 4096, 4096, "bfloat16", "bfloat16", "decode"),  # K is split
    (5, 576, 1536, "float32", "bfloat16", "decode"),
    (64, 28672, 4096, "bfloat16", "float32", "decode"),
    (100, 200, 96, "bfloat16", "bfloat16", "decode"),
    (130, 192, 576, "bfloat16", "float32", "gemm"),
    (300, 8, 32, "float32", "float32", "gemm"),
    (512, 4096, 14336, "bfloat16", "bfloat16", "gemm"),
    (4096, 28672, 4096, "bfloat16", "bfloat16", "gemm"),  # in clusters
]


@pytest.fixture(scope="module")
def compiled():
    """The program of each product. From another process: the plugin looks for a GPU in this one."""
    path = os.pathsep.join(sys.path)
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    command = [sys.executable, __file__, json.dumps(PRODUCTS)]
    process = subprocess.run(command, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout)


@pytest.mark.parametrize(("product", "i"), [(p, i) for i, p in enumerate(PRODUCTS)])
def test_a_product_compiles(compiled, product, i):
    assert "jaxquant_quantize_activations" in compiled[i]
    assert f"jaxquant_{product[-1]}_fp8" in compiled[i]


def compile_for_h200(products: list) -> list[str | None]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies

    from jaxquant.array import QuantizedArray
    from jaxquant.matmul import mosaic_gpu

    mosaic_gpu._multiprocessors = lambda x: 132
    spec = (Path(__file__).parent / "h200.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=spec, topology="1x1x1")
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def compile_product(M, N, K, x_dtype, out_dtype, _):
        def product(x, qvalue, scale, layer):
            w = QuantizedArray(qvalue, scale, (128, 128), np.dtype(jnp.bfloat16))
            return mosaic_gpu.matmul(x, w, layer, out_dtype)

        scale_shape = (2, -(-N // 128), -(-K // 128))
        operands = [
            ((M, K), x_dtype),
            ((2, N, K), "float8_e4m3fn"),
            (scale_shape, "float32"),
            ((), "int32"),
        ]
        args = [jax.ShapeDtypeStruct(*o, sharding=replicated) for o in operands]
        return jax.jit(product).lower(*args).compile().as_text()

    return [compile_product(*p) for p in products]


if __name__ == "__main__":
    print(json.dumps(compile_for_h200(json.loads(sys.argv[1]))))
