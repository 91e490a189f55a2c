"""Hopper kernels in tests: on a GPU, or on a machine that has none.

Without a GPU, Pallas's interpreter runs them on a CPU; with JAXQUANT_TEST_GPU=1, this machine's GPU
does, in the same tests. And they are compiled for an H200 wherever jax's CUDA plugin is, of jax's
own version, with nothing of CUDA besides: `pip install --no-deps jax-cuda13-plugin
jax-cuda13-pjrt`. `h200.txtpb` is what XLA's `specs/h200.txtpb` says of the GPU.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

needs_plugin = pytest.mark.skipif(
    not find_spec("jax_cuda13_plugin"), reason="needs jax-cuda13-plugin, to compile for a GPU"
)

ON_GPU = os.environ.get("JAXQUANT_TEST_GPU") == "1"
# Of results in float32, what sums cost: those of the tensor cores keep fewer bits than float32.
FLOAT32 = 3e-4 if ON_GPU else 1e-6


@contextlib.contextmanager
def on_hopper(
    monkeypatch: pytest.MonkeyPatch, *modules: Any, sms: int = 2, **params: Any
) -> Iterator:
    """Kernels run: on the GPU if tests are to, else by Pallas's interpreter.

    For that, a CPU stands in for a Hopper GPU where these modules ask, with so few multiprocessors
    that a thread block goes through several tiles. What lies outside an array reads as zeros, as on
    a GPU, but for what InterpretGPUParams say otherwise.
    """
    if ON_GPU:
        yield
        return
    from jax.experimental.pallas import mosaic_gpu as plgpu

    for module in modules:
        monkeypatch.setattr(module, "multiprocessors", lambda x, what: sms)
    zeros = {"out_of_bounds_reads": "uninitialized", "uninitialized_memory": "zero"}
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(**(zeros | params))):
        yield


def run_apart(file: str) -> Any:
    """What `file` prints, as JSON. In another process: the plugin looks for a GPU in this one."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    command = [sys.executable, file]
    process = subprocess.run(command, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout)


def h200() -> Any:
    """The sharding of what lies on one H200; the kernels take it for the device."""
    import jax

    return jax.sharding.NamedSharding(h200s(1), jax.sharding.PartitionSpec())


def h200s(n: int) -> Any:
    """A mesh of n of them, its axis "x"."""
    from jax.experimental import topologies

    from jaxquant.attention import fp8, mosaic_gpu as attention, prefill
    from jaxquant.matmul import mlp, mosaic_gpu as matmul, routing, weight_quant

    modules: tuple[Any, ...] = (attention, fp8, prefill, matmul, mlp, routing, weight_quant)
    for module in modules:
        module.multiprocessors = lambda x, what: 132
    spec = (Path(__file__).parent / "matmul" / "h200.txtpb").read_text()
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=spec, topology=f"1x1x{n}"
    )
    return topologies.make_mesh(topology, (n,), ("x",))


def in_place_in_fusions(hlo: str) -> list[str]:
    """Fusions of a compiled program that have a kernel in them which writes in place."""
    fusions = set(re.findall(r" fusion\(.*calls=%([\w.\-]+)", hlo))
    computations = re.findall(r"^%([\w.\-]+) (.*?)^}", hlo, re.MULTILINE | re.DOTALL)
    assert "output_to_operand_aliasing={{" in hlo
    return [name for name, text in computations if name in fusions and "operand_aliasing" in text]


def llama(H: int, F: int, layers: int, heads: tuple[int, int, int], vocab: int, slots: int) -> Any:
    """The family of a Llama: hidden and MLP size, layers, (heads, key/value heads, their dims)."""
    from jaxquant.models.hf_config import HFConfig
    from jaxquant.models.registry import Family

    names = ("num_attention_heads", "num_key_value_heads", "head_dim")
    sizes = {
        "hidden_size": H,
        "intermediate_size": F,
        "num_hidden_layers": layers,
        **dict(zip(names, heads, strict=True)),
        "vocab_size": vocab,
        "max_position_embeddings": slots,
    }
    return Family(HFConfig({"architectures": ["LlamaForCausalLM"], **sizes}))


def quantized(leaf: Any, shaped: Any) -> Any:
    """A weight `[..., N, K]` in blocked FP8, of the arrays that `shaped(shape, dtype)` gives."""
    import jax.numpy as jnp

    import jaxquant as jq
    from jaxquant.blocked import grid_shape

    config = jq.QuantConfig()
    *lead, N, K = leaf.shape
    return jq.QuantizedArray(
        shaped(leaf.shape, config.fmt_dtype),
        shaped((*lead, *grid_shape((N, K), config.weight_block_size)), jnp.float32),
        block_size=config.weight_block_size,
        dtype=jnp.dtype(leaf.dtype),
    )
