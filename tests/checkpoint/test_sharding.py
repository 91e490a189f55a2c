"""Loading onto several devices: the bytes of one, each device its own, nothing else read."""

import dataclasses
import math
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, cast

import builders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec as P

import jaxquant as jq
from jaxquant.array import QuantizedArray
from jaxquant.checkpoint import export, stream
from jaxquant.checkpoint.sharding import tensor_axis
from jaxquant.errors import JaxquantError
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.registry import Family, places

CONFIG = jq.QuantConfig(weight_block_size=builders.BLOCKS)
# Four devices divide everything but the embedding of 261 tokens, which lies by its columns.
SIZES = {
    **builders.CONFIG,
    "hidden_size": 128,
    "intermediate_size": 256,
    "vocab_size": 261,
    "num_key_value_heads": 4,
}
TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)
ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return builders.checkpoint(
        tmp_path_factory.mktemp("sharding") / "bf16", builders.tensors(SIZES), config=SIZES
    )


def mesh(*shape, names=("model",)):
    return Mesh(np.array(jax.devices()[: math.prod(shape)]).reshape(shape), names)


def leaves(model):
    return dict(jax.tree.leaves_with_path(model.module))


def tensors(model):
    """As they are in a checkpoint: where rows of a fused weight lie depends on the devices."""
    slots = Family(HFConfig(model.hf_config)).slots()
    sources = (
        source
        for name, place in places(model.module, slots).items()
        for source in export._array_sources(
            name,
            place.param.get_value(),
            slots[name].shape,
            place.index,
            place.row,
            place.group,
        )
    )
    return {source.name: np.concatenate(list(source.pieces())) for source in sources}


def assert_same_parameters(a, b):
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert (x.dtype, x.shape) == (b[name].dtype, b[name].shape), name
        assert x.tobytes() == b[name].tobytes(), name


def close(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


class TestParameters:
    @pytest.mark.parametrize("config", [CONFIG, None], ids=["fp8", "bf16"])
    @pytest.mark.parametrize("n", [1, 2, 4])
    def test_have_the_bytes_of_one_device(self, source, config, n):
        whole, sharded = (jq.from_pretrained(source, config, mesh=m) for m in (None, mesh(n)))
        assert_same_parameters(sharded, whole)
        for a, b in zip(sharded.report.tensors, whole.report.tensors, strict=True):
            assert (a.relative_error or 0) == pytest.approx(b.relative_error or 0, rel=1e-5)
            assert dataclasses.replace(a, relative_error=None) == dataclasses.replace(
                b, relative_error=None
            )

    @pytest.mark.parametrize(
        ("family", "config"),
        [("llama/llama3", CONFIG), ("llama/llama3", None), ("moe/mixtral", CONFIG)],
    )
    def test_and_compute_its_logits(self, family, config):
        whole, sharded = (
            jq.from_pretrained(GOLDEN / family, config, jnp.float32, m) for m in (None, mesh(2))
        )
        # A sum in another order may round an activation to the next FP8 value.
        assert close(sharded(TOKENS), whole(TOKENS)) < (1e-2 if config else 1e-5)

    def test_and_generate(self, source):
        model = jq.from_pretrained(source, CONFIG, jnp.float32, mesh(4))
        assert len(model.generate(TOKENS[:, :4], max_new_tokens=3, stop_tokens=[])[1]) == 3

    def test_lie_by_outputs_or_inputs(self, source):
        module = jq.from_pretrained(source, CONFIG, mesh=mesh(4)).module
        layers = module.layers[0]
        specs = {
            "qkv": layers.self_attn.qkv_proj.weight,
            "o": layers.self_attn.o_proj.weight,
            "gate_up": layers.mlp.gate_up_proj.weight,
            "down": layers.mlp.down_proj.weight,
            "norm": layers.input_layernorm.weight,
            "embed": module.embed_tokens.weight,
        }
        got = {}
        for name, param in specs.items():
            value = param.get_value()
            if isinstance(value, QuantizedArray):
                assert value.qvalue.sharding == value.scale.sharding
                value = value.qvalue
            got[name] = value.sharding.spec
            assert len(value.addressable_shards) == 4
        assert got == {
            "qkv": P(None, "model"),
            "o": P(None, None, "model"),
            "gate_up": P(None, "model"),
            "down": P(None, None, "model"),
            "norm": P(),
            "embed": P(None, "model"),
        }

    def test_whole_blocks_that_do_not_divide_are_copies(self, tmp_path):
        source = builders.checkpoint(tmp_path / "small")  # 160 is 5 blocks of 32
        whole, sharded = (jq.from_pretrained(source, CONFIG, mesh=m) for m in (None, mesh(4)))
        assert_same_parameters(sharded, whole)
        down = sharded.module.layers[0].mlp.down_proj.weight.get_value()
        assert down.qvalue.sharding.spec == P()
        assert down.qvalue.sharding.is_fully_replicated

    def test_of_several_slabs(self, source, monkeypatch):
        whole = jq.from_pretrained(source, CONFIG)
        monkeypatch.setattr(stream, "lanes", lambda: stream.Lanes(3, builders.BLOCK * 64))
        assert_same_parameters(jq.from_pretrained(source, CONFIG, mesh=mesh(2)), whole)

    def test_on_devices_that_do_not_take_numpys_memory(self, source, monkeypatch):
        from jaxquant.checkpoint import target

        whole = jq.from_pretrained(source, CONFIG)
        monkeypatch.setattr(target, "_host_zeros", jnp.zeros)
        assert_same_parameters(jq.from_pretrained(source, CONFIG, mesh=mesh(4)), whole)

    def test_that_are_fp8_already(self, tmp_path, source):
        jq.quantize_checkpoint(source, tmp_path / "fp8", CONFIG)
        whole, sharded = (jq.from_pretrained(tmp_path / "fp8", mesh=m) for m in (None, mesh(4)))
        assert_same_parameters(sharded, whole)

    @pytest.mark.parametrize("family", ["internlm/internlm2", "moe/mixtral", "moe/deepseek_v3"])
    def test_of_other_families(self, family):
        source = GOLDEN / family
        whole, sharded = (jq.from_pretrained(source, CONFIG, mesh=m) for m in (None, mesh(2)))
        assert_same_parameters(sharded, whole)

    def test_along_the_axis_named_model(self, source):
        both = mesh(2, 2, names=("data", "model"))
        whole, sharded = (jq.from_pretrained(source, CONFIG, mesh=m) for m in (None, both))
        assert_same_parameters(sharded, whole)
        down = sharded.module.layers[0].mlp.down_proj.weight.get_value()
        assert {shard.data.shape for shard in down.qvalue.addressable_shards} == {(2, 128, 128)}

    def test_of_a_mesh_that_types_shardings(self, source):
        explicit = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Explicit,))
        sharded = jq.from_pretrained(source, CONFIG, mesh=explicit)
        assert_same_parameters(sharded, jq.from_pretrained(source, CONFIG))
        norm = sharded.module.norm.weight.get_value()
        assert norm.sharding.mesh.axis_types == (AxisType.Auto,)


class TestMeshes:
    def test_need_an_axis_to_divide_over(self, source):
        assert tensor_axis(mesh(2, names=("x",))) == "x"
        assert tensor_axis(mesh(2, 2, names=("model", "x"))) == "model"
        with pytest.raises(JaxquantError, match=r"mesh has axes \('x', 'y'\); allowed: one axis"):
            jq.from_pretrained(source, mesh=mesh(2, 2, names=("x", "y")))

    def test_are_meshes(self, source, unchecked):
        with pytest.raises(JaxquantError, match=r"mesh is 4; allowed: None or a jax.sharding.Mesh"):
            jq.from_pretrained(source, mesh=cast(Any, 4))


HALF = """
    import os, sys
    import jax
    import numpy as np
    import jaxquant as jq
    from jaxquant.checkpoint import reader

    source, expected, block, port, number = sys.argv[1:]
    jax.distributed.initialize(f"localhost:{port}", 2, int(number))
    counts, preadv = [], os.preadv

    def count(*args):
        counts.append(preadv(*args))
        return counts[-1]

    reader.os.preadv = count
    mesh = jax.sharding.Mesh(jax.devices(), ("model",))
    config = jq.QuantConfig(weight_block_size=int(block))
    model = jq.from_pretrained(source, config, mesh=mesh)
    whole = np.load(expected)
    for path, leaf in jax.tree.leaves_with_path(model.module):
        (shard,) = leaf.addressable_shards
        part = np.asarray(shard.data)
        assert part.tobytes() == whole[jax.tree_util.keystr(path)][shard.index].tobytes(), path
    print(sum(counts))
"""


def test_a_process_reads_what_its_devices_hold(tmp_path, source):
    whole = leaves(jq.from_pretrained(source, CONFIG, mesh=mesh(2)))
    as_bits = {
        jax.tree_util.keystr(path): np.asarray(x).view(f"u{x.dtype.itemsize}")
        for path, x in whole.items()
    }
    np.savez(tmp_path / "expected.npz", **cast(Any, as_bits))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    argv = [source, tmp_path / "expected.npz", builders.BLOCK, port]
    command = [sys.executable, "-c", textwrap.dedent(HALF), *map(str, argv)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    weights = builders.tensors(SIZES).values()
    half = sum(w.nbytes // 2 if w.ndim == 2 else w.nbytes for w in weights)  # norms are on both
    with (
        subprocess.Popen([*command, "0"], **pipes) as first,
        subprocess.Popen([*command, "1"], **pipes) as second,
    ):
        for process in (first, second):
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            assert int(out.split()[-1]) == half
