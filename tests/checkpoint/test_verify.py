"""`verify`: what an export holds, against what it should; each way to differ is named."""

import dataclasses
import json
import shutil

import builders
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.checkpoint.verify import verify
from jaxquant.errors import CheckpointError

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return builders.checkpoint(tmp_path_factory.mktemp("source") / "bf16", shards=2)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "fp8"


def without_reasons(report):
    """An export's config.json lists what is kept, and that is the reason given then."""
    return [dataclasses.replace(tensor, reason="") for tensor in report.tensors]


@pytest.mark.parametrize(
    "config",
    [
        jq.QuantConfig(weight_block_size=builders.BLOCKS),
        jq.QuantConfig(weight_block_size=(16, 48), scale_fmt="ue8m0", fmt="e5m2"),
        jq.QuantConfig(activation_scheme=None, modules_to_not_convert=("layers.0.mlp", "o_proj")),
    ],
)
def test_an_export_holds_what_it_should(source, out, config):
    report = jq.quantize_checkpoint(source, out, config, max_shard_bytes=50_000)
    assert without_reasons(verify(source, out)) == without_reasons(report)


def test_a_saved_model_holds_the_same(source, out):
    config = jq.QuantConfig(weight_block_size=builders.BLOCKS)
    model = jq.from_pretrained(source, config)
    model.save_pretrained(out)
    assert without_reasons(verify(source, out)) == without_reasons(model.report)


def change(out, edit):
    """Edits the tensors of an export of one file."""
    weights = {}
    for name, (dtype, shape, data) in builders.load(out).items():
        dtypes = {"F8_E4M3": builders.E4M3, "F32": np.float32, "BF16": builders.BF16}
        weights[name] = np.frombuffer(data, dtypes[dtype]).reshape(shape).copy()
    edit(weights)
    builders.save(out / "model.safetensors", weights)


def flip(name, index):
    def edit(weights):
        weights[name].view(np.uint8)[index] ^= 1

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (flip(UP, (130, 7)), rf"tensor {UP} has other values than follow .* in rows 0 to 159;"),
        (flip(f"{UP}_scale_inv", (2, 1)), rf"tensor {UP}_scale_inv has other values .* 0 to 4;"),
        (flip("model.norm.weight", 3), "tensor model.norm.weight has other values .* 0 to 63;"),
        (lambda w: w.pop(f"{UP}_scale_inv"), rf"no tensor '{UP}_scale_inv' among its"),
        (lambda w: w.update(extra=np.ones(3, np.float32)), "tensor extra follows from nothing in"),
        (
            lambda w: w.update({UP: w[UP].reshape(64, 160)}),
            rf"tensor {UP} is float8_e4m3fn \[64, 160\]; its source asks for .*\[160, 64\]",
        ),
        (
            lambda w: w.update({"model.norm.weight": w["model.norm.weight"].astype(np.float32)}),
            r"model.norm.weight is float32 \[64\]; its source asks for bfloat16 \[64\]",
        ),
    ],
)
def test_what_differs_is_named(source, out, edit, message):
    jq.quantize_checkpoint(source, out, jq.QuantConfig(weight_block_size=builders.BLOCKS))
    change(out, edit)
    with pytest.raises(CheckpointError, match=message):
        verify(source, out)


def test_the_first_tensor_that_differs_is_named(source, out):
    jq.quantize_checkpoint(source, out, jq.QuantConfig(weight_block_size=builders.BLOCKS))
    first = UP.replace("layers.1", "layers.0")
    change(out, lambda w: (flip(UP, (0, 0))(w), flip(first, (0, 0))(w)))
    with pytest.raises(CheckpointError, match=first):
        verify(source, out)


def test_another_source_is_told_apart(tmp_path, source, out):
    jq.quantize_checkpoint(source, out, jq.QuantConfig(weight_block_size=builders.BLOCKS))
    weights = builders.tensors()
    weights[UP] = weights[UP][::-1].copy()
    other = builders.checkpoint(tmp_path / "other", weights)
    with pytest.raises(CheckpointError, match=rf"{UP} has other values"):
        verify(other, out)


def test_what_is_no_export_is_refused(tmp_path, source, out):
    with pytest.raises(CheckpointError, match="bf16: not FP8; allowed: what quantize wrote"):
        verify(source, source)
    jq.quantize_checkpoint(source, out, jq.QuantConfig(weight_block_size=builders.BLOCKS))
    with pytest.raises(CheckpointError, match="fp8: FP8 already; give the checkpoint it came from"):
        verify(out, out)
    shutil.copytree(out, tmp_path / "other")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["scale_fmt"] = "ue8m0"
    builders.edit_json(tmp_path / "other" / "config.json", **config)
    with pytest.raises(CheckpointError, match="has other values"):
        verify(source, tmp_path / "other")
