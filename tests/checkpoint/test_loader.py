"""Loading: the bytes of online quantization, FP8 checkpoints as they come, memory, reports."""

import dataclasses
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import builders
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from builders import BLOCK, is_projection

import jaxquant as jq
from jaxquant.array import QuantizedArray
from jaxquant.checkpoint.folder import CheckpointFolder
from jaxquant.checkpoint.loader import load
from jaxquant.checkpoint.plan import make_plan
from jaxquant.errors import CheckpointError, JaxquantError
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.registry import Family, places

CONFIG = jq.QuantConfig(weight_block_size=builders.BLOCKS)
QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
ROOT = Path(__file__).parents[2]


@pytest.fixture
def weights():
    return builders.tensors()


@pytest.fixture
def source(tmp_path, weights):
    return builders.checkpoint(tmp_path / "bf16", weights)


def parameters(model):
    """Checkpoint name -> numpy array, or (qvalue, scale)."""
    slots, result = Family(HFConfig(model.hf_config)).slots(), {}
    for name, place in places(model.module, slots).items():
        value, index = place.param.get_value(), ... if place.index is None else place.index
        N = slots[name].shape[0]

        def rows(array, start=place.row, N=N, index=index):
            return np.asarray(array)[index][start : start + N]

        if isinstance(value, QuantizedArray):
            bo = value.block_size[0]
            result[name] = rows(value.qvalue), rows(value.scale, place.row // bo, -(-N // bo))
        else:
            result[name] = rows(value)
    return result


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        for x, y in zip(_as_tuple(a[name]), _as_tuple(b[name]), strict=True):
            assert (x.dtype, x.shape) == (y.dtype, y.shape), name
            assert x.tobytes() == y.tobytes(), name


def _as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def quantized(weights, config, dtype=builders.BF16):
    """What loading has to give: `jq.quantize` of each projection, everything else cast."""
    result = {}
    for name, w in weights.items():
        if is_projection(name):
            qa = jq.quantize(w, config)
            result[name] = np.asarray(qa.qvalue), np.asarray(qa.scale)
        else:
            result[name] = w.astype(dtype)
    return result


class TestOnlineQuantization:
    @pytest.mark.parametrize(
        "config",
        [
            jq.QuantConfig(),
            CONFIG,
            jq.QuantConfig(weight_block_size=(16, 48), scale_fmt="ue8m0"),
            jq.QuantConfig(fmt="e5m2", weight_block_size=(200, 8)),
        ],
    )
    def test_bytes_are_those_of_quantize(self, source, weights, config):
        model = jq.from_pretrained(source, config)
        assert_equal(parameters(model), quantized(weights, config))
        assert model.quant_config == config

    def test_any_number_of_shards_gives_the_same(self, tmp_path, source, weights):
        one = jq.from_pretrained(source, CONFIG)
        many = jq.from_pretrained(builders.checkpoint(tmp_path / "s", weights, shards=3), CONFIG)
        assert_equal(parameters(one), parameters(many))
        assert one.report == many.report

    @pytest.mark.parametrize("dtype", [np.float16, np.float32])
    def test_sources_of_other_dtypes(self, tmp_path, dtype):
        weights = builders.tensors(dtype=np.dtype(dtype))
        rng = np.random.default_rng(1)
        for name, w in weights.items():  # what bfloat16 cannot hold
            weights[name] = (w * (1 + 1e-3 * rng.standard_normal(w.shape))).astype(dtype)
        model = jq.from_pretrained(builders.checkpoint(tmp_path / "w", weights), CONFIG)
        assert_equal(parameters(model), quantized(weights, CONFIG))

    def test_tensors_of_several_slabs(self, monkeypatch, source, weights):
        from jaxquant.checkpoint import stream

        whole = jq.from_pretrained(source, CONFIG)
        monkeypatch.setattr(stream, "lanes", lambda: stream.Lanes(3, BLOCK * 64))
        slabs = jq.from_pretrained(source, CONFIG)
        assert_equal(parameters(slabs), quantized(weights, CONFIG))
        for a, b in zip(whole.report.tensors, slabs.report.tensors, strict=True):
            assert dataclasses.replace(a, relative_error=None) == dataclasses.replace(
                b, relative_error=None
            )
            assert (a.relative_error is None) == (b.relative_error is None)
            if a.relative_error is not None:
                assert b.relative_error == pytest.approx(a.relative_error, rel=1e-5)

    def test_devices_that_do_not_take_numpys_memory(self, monkeypatch, source, weights):
        from jaxquant.checkpoint import stream, target

        monkeypatch.setattr(target, "_host_zeros", jnp.zeros)
        monkeypatch.setattr(stream, "lanes", lambda: stream.Lanes(3, BLOCK * 64))
        model = jq.from_pretrained(source, CONFIG)
        assert_equal(parameters(model), quantized(weights, CONFIG))

    def test_the_head_if_asked(self, tmp_path, source, weights):
        config = dataclasses.replace(CONFIG, quantize_head=True)
        model = jq.from_pretrained(source, config)
        head = jq.quantize(weights["lm_head.weight"], CONFIG)
        expected = quantized(weights, CONFIG)
        expected["lm_head.weight"] = np.asarray(head.qvalue), np.asarray(head.scale)
        assert_equal(parameters(model), expected)
        jq.quantize_checkpoint(source, tmp_path / "fp8", config)
        again = jq.from_pretrained(tmp_path / "fp8")
        assert_equal(parameters(again), expected)
        assert again.quant_config == CONFIG

    def test_a_tied_head_is_not_quantized(self, tmp_path, weights):
        del weights["lm_head.weight"]
        source = builders.checkpoint(tmp_path / "tied", weights, tie_word_embeddings=True)
        with pytest.raises(CheckpointError, match="tie_word_embeddings is true: the head is"):
            jq.from_pretrained(source, dataclasses.replace(CONFIG, quantize_head=True))

    def test_modules_to_not_convert_are_kept(self, source, weights):
        kept = ("model.layers.1.mlp", "q_proj")
        config = dataclasses.replace(CONFIG, modules_to_not_convert=kept)
        model = jq.from_pretrained(source, config)
        expected = quantized(weights, CONFIG)
        for name in weights:
            if "layers.1.mlp" in name or "q_proj" in name:
                expected[name] = weights[name]
        assert_equal(parameters(model), expected)
        reasons = {t.path: t.reason for t in model.report.kept}
        assert "q_proj" in reasons["model/layers/0/self_attn/q_proj/weight"]

    def test_dtype_is_that_of_what_is_kept_and_computed(self, source):
        model = jq.from_pretrained(source, CONFIG, "float16")
        assert model.module.norm.weight.get_value().dtype == jnp.float16
        down = model.module.layers[0].mlp.down_proj.weight.get_value()
        assert down.dtype == jnp.float16
        assert down.scale.dtype == jnp.float32

    def test_a_config_can_be_hugging_faces_mapping(self, source):
        assert jq.from_pretrained(source, QUANTIZATION).quant_config == CONFIG

    @pytest.mark.parametrize("asked", ["fp8", True, 128])
    def test_anything_else_is_no_config(self, source, asked, unchecked):
        with pytest.raises(JaxquantError, match=r"quant_config is .*; allowed: None or a Quant"):
            jq.from_pretrained(source, asked)

    def test_dtypes_that_do_not_compute_are_refused(self, source):
        with pytest.raises(JaxquantError, match="dtype is int8; allowed: bfloat16"):
            jq.from_pretrained(source, dtype=jnp.int8)

    def test_nothing_to_quantize_is_an_error(self, source):
        config = jq.QuantConfig(modules_to_not_convert=("model",))
        with pytest.raises(CheckpointError, match=r"no tensor would be quantized.*'model'"):
            jq.from_pretrained(source, config)

    def test_the_report_is_of_every_tensor_and_the_same_each_time(self, source, weights):
        first = jq.from_pretrained(source, CONFIG)
        report = first.report
        assert report == jq.from_pretrained(source, CONFIG).report
        assert {t.path.replace("/", ".") for t in report.tensors} == weights.keys()
        assert {t.path.replace("/", ".") for t in report.quantized} == set(
            filter(is_projection, weights)
        )
        assert report.bytes_before == sum(w.nbytes for w in weights.values())
        assert report.bytes_after == first.nbytes
        for t in report.quantized:
            w = weights[t.path.replace("/", ".")].astype(np.float32)
            back = np.asarray(jq.quantize(w, CONFIG).dequantize(jnp.float32))
            error = np.linalg.norm(w - back) / np.linalg.norm(w)
            assert t.relative_error == pytest.approx(error, rel=1e-4)
            assert t.shape == w.shape

    def test_the_plain_model_reports_nothing_quantized(self, source):
        model = jq.from_pretrained(source)
        assert model.quant_config is None
        assert not model.report.quantized
        assert {t.reason for t in model.report.tensors} == {"no FP8 asked for"}


class TestStoredFP8:
    """FP8 checkpoints are used as they are: the same bytes, never quantized twice."""

    def check(self, folder, fp8, scales, **expected):
        model = jq.from_pretrained(folder)
        want = {
            name: (w, scales[name].astype(np.float32)) if name in scales else w
            for name, w in fp8.items()
        }
        assert_equal(parameters(model), want)
        assert model.quant_config is not None
        for field, value in expected.items():
            assert getattr(model.quant_config, field) == value
        assert {t.reason for t in model.report.quantized} == {"FP8 in the checkpoint"}
        assert len(model.report.quantized) == len(scales)
        return model

    def write(
        self, folder, weights, *, dtype: Any = np.float32, suffix="_scale_inv", **options: Any
    ):
        config = options.pop("quantization", QUANTIZATION)
        fp8, scales = builders.fp8_weights(weights, ue8m0=dtype != np.float32)
        stored = {name + suffix: scale.astype(dtype) for name, scale in scales.items()}
        options.setdefault("quantization_config", config)
        return builders.checkpoint(folder, {**fp8, **stored}, **options), fp8, scales

    def test_own_export(self, tmp_path, source):
        jq.quantize_checkpoint(source, tmp_path / "fp8", CONFIG)
        stored, online = jq.from_pretrained(tmp_path / "fp8"), jq.from_pretrained(source, CONFIG)
        assert_equal(parameters(stored), parameters(online))
        tokens = np.arange(8, dtype=np.int32)[None]
        assert np.array_equal(stored(tokens), online(tokens))

    def test_deepseek(self, tmp_path, weights):
        self.check(*self.write(tmp_path / "w", weights), weight_block_size=(BLOCK, BLOCK))

    @pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
    def test_scales_of_16_bits(self, tmp_path, weights, dtype):
        self.check(*self.write(tmp_path / "w", weights, dtype=np.dtype(dtype)))

    @pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.float8_e8m0fnu])
    def test_scales_that_are_powers_of_two(self, tmp_path, weights, dtype):
        quantization = {**QUANTIZATION, "scale_fmt": "ue8m0"}
        folder, fp8, scales = self.write(tmp_path / "w", weights, dtype=builders.E8M0)
        edited = {f"{name}_scale_inv": scale.astype(dtype) for name, scale in scales.items()}
        builders.checkpoint(folder, {**fp8, **edited}, quantization_config=quantization)
        self.check(folder, fp8, scales, scale_fmt="ue8m0")

    def test_scales_named_after_the_module(self, tmp_path, weights):
        fp8, scales = builders.fp8_weights(weights)
        named = {name.removesuffix(".weight") + ".scale": scale for name, scale in scales.items()}
        folder = builders.checkpoint(
            tmp_path / "w", {**fp8, **named}, quantization_config=QUANTIZATION
        )
        self.check(folder, fp8, scales)

    def test_scales_in_another_shard(self, tmp_path, weights):
        self.check(*self.write(tmp_path / "w", weights, shards=4))

    @pytest.mark.parametrize(
        "activations", [None, {"num_bits": 8, "type": "float", "dynamic": True}]
    )
    @pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
    def test_compressed_tensors(self, tmp_path, weights, activations, key):
        scheme = {
            "num_bits": 8,
            "type": "float",
            "strategy": "block",
            "block_structure": [BLOCK, BLOCK],
            "symmetric": True,
            "dynamic": False,
        }
        quantization = {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "ignore": ["lm_head"],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": scheme,
                    "input_activations": activations,
                }
            },
        }
        folder, fp8, scales = self.write(
            tmp_path / "w", weights, suffix="_scale", quantization_config=None
        )
        builders.edit_json(folder / "config.json", **{key: quantization})
        model = self.check(
            folder, fp8, scales, activation_scheme=None if activations is None else "dynamic"
        )
        jq.save_pretrained(model, tmp_path / "again")  # in the one form that is written
        config = json.loads((tmp_path / "again" / "config.json").read_text())
        assert "compression_config" not in config
        assert config["quantization_config"]["quant_method"] == "fp8"
        assert_equal(parameters(jq.from_pretrained(tmp_path / "again")), parameters(model))

    def test_a_head_in_fp8(self, tmp_path, weights):
        fp8, scales = builders.fp8_weights(weights)
        head = jq.quantize(weights["lm_head.weight"], CONFIG)
        fp8["lm_head.weight"] = np.asarray(head.qvalue)
        scales["lm_head.weight"] = np.asarray(head.scale)
        stored = {f"{name}_scale_inv": scale for name, scale in scales.items()}
        folder = builders.checkpoint(
            tmp_path / "w", {**fp8, **stored}, quantization_config=QUANTIZATION
        )
        model = self.check(folder, fp8, scales)
        tokens = np.arange(8, dtype=np.int32)[None]
        plain = jq.from_pretrained(builders.checkpoint(tmp_path / "bf16", weights), CONFIG)(tokens)
        difference = np.linalg.norm(model(tokens) - plain) / np.linalg.norm(plain)
        assert 1e-3 < difference < 0.1
        jq.save_pretrained(model, tmp_path / "again")
        config = json.loads((tmp_path / "again" / "config.json").read_text())
        assert config["quantization_config"]["modules_to_not_convert"] == []
        assert_equal(parameters(jq.from_pretrained(tmp_path / "again")), parameters(model))

    def test_layers_that_are_not_fp8_stay_so(self, tmp_path, weights):
        fp8, scales = builders.fp8_weights(weights)
        plain = [name for name in scales if "layers.1.mlp" in name]
        for name in plain:
            fp8[name] = weights[name]
            del scales[name]
        stored = {f"{name}_scale_inv": scale for name, scale in scales.items()}
        folder = builders.checkpoint(
            tmp_path / "w", {**fp8, **stored}, quantization_config=QUANTIZATION
        )
        model = self.check(folder, fp8, scales)
        jq.save_pretrained(model, tmp_path / "again")
        config = json.loads((tmp_path / "again" / "config.json").read_text())
        kept = config["quantization_config"]["modules_to_not_convert"]
        assert kept == [
            *(f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")),
            "lm_head",
        ]

    def test_weight_only_may_be_asked_of_them(self, tmp_path, weights):
        folder, _, _ = self.write(tmp_path / "w", weights)
        config = dataclasses.replace(CONFIG, activation_scheme=None)
        model, as_stored = jq.from_pretrained(folder, config), jq.from_pretrained(folder)
        assert_equal(parameters(model), parameters(as_stored))
        assert model.quant_config == config
        tokens = np.arange(8, dtype=np.int32)[None]
        assert not np.array_equal(model(tokens), as_stored(tokens))

    @pytest.mark.parametrize(
        "asked",
        [
            jq.QuantConfig(),
            dataclasses.replace(CONFIG, fmt="e5m2"),
            dataclasses.replace(CONFIG, scale_fmt="ue8m0"),
        ],
    )
    def test_another_config_is_an_error_that_says_both(self, tmp_path, weights, asked):
        folder, _, _ = self.write(tmp_path / "w", weights)
        with pytest.raises(CheckpointError) as caught:
            jq.from_pretrained(folder, asked)
        assert CONFIG.describe() in str(caught.value)
        assert asked.describe() in str(caught.value)

    def test_keeping_what_is_fp8_already_is_an_error(self, tmp_path, weights):
        folder, _, _ = self.write(tmp_path / "w", weights)
        config = dataclasses.replace(CONFIG, modules_to_not_convert=("k_proj",))
        with pytest.raises(CheckpointError, match=r"k_proj.weight is FP8 already, but .*'k_proj'"):
            jq.from_pretrained(folder, config)


class TestSomeLayers:
    """A stage of a pipeline reads its own layers, and nothing else of the files."""

    def load(self, folder, layers, monkeypatch):
        read, read_rows = set(), CheckpointFolder.read_rows

        def spy(self, name, *args, **options):
            read.add(name)
            return read_rows(self, name, *args, **options)

        monkeypatch.setattr(CheckpointFolder, "read_rows", spy)
        with CheckpointFolder(folder) as opened:
            plan = make_plan(opened, CONFIG).only(layers)
            model, report = load(opened, plan, jnp.bfloat16)
        assert {t.path.replace("/", ".") for t in report.tensors} == read
        return model, plan, read

    @pytest.mark.parametrize(
        ("layers", "outside"),
        [
            (range(1), {"model.embed_tokens.weight"}),
            (range(1, 2), {"model.norm.weight", "lm_head.weight"}),
        ],
    )
    def test_of_untied(self, source, weights, monkeypatch, layers, outside):
        model, plan, read = self.load(source, layers, monkeypatch)
        inside = {name for name in weights if f"layers.{layers.start}." in name}
        assert read == inside | outside
        whole = jq.from_pretrained(source, CONFIG)
        slots = {item.name: item.slot for item in plan.items}
        full = places(whole.module, slots)
        for name, place in places(model, slots).items():
            got, expected = place.param.get_value(), full[name].param.get_value()
            index, layer = (
                (place.index, full[name].index) if place.index is not None else (..., ...)
            )
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
                assert np.asarray(a)[index].tobytes() == np.asarray(b)[layer].tobytes()

    def test_a_tied_head_takes_the_embedding_along(self, tmp_path, monkeypatch):
        folder = builders.checkpoint(
            tmp_path / "tied", config={**builders.CONFIG, "tie_word_embeddings": True}
        )
        _, _, read = self.load(folder, range(1, 2), monkeypatch)
        assert {"model.norm.weight", "model.embed_tokens.weight"} <= read
        assert not any("layers.0." in name for name in read)


class TestTiedHead:
    def test_a_head_stored_twice_is_the_embedding(self, tmp_path):
        config = {**builders.CONFIG, "tie_word_embeddings": True}
        weights = builders.tensors(config)
        once = builders.checkpoint(tmp_path / "once", weights, config=config)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        twice = builders.checkpoint(tmp_path / "twice", weights, config=config)
        a, b = jq.from_pretrained(once, CONFIG), jq.from_pretrained(twice, CONFIG)
        assert a.report == b.report
        assert_equal(parameters(a), parameters(b))
        jq.quantize_checkpoint(twice, tmp_path / "fp8", CONFIG)
        assert "lm_head.weight" not in builders.load(tmp_path / "fp8")

    def test_old_rotary_buffers_are_ignored(self, tmp_path, weights):
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
        model = jq.from_pretrained(builders.checkpoint(tmp_path / "w", weights), CONFIG)
        assert len(model.report.tensors) == len(weights) - 1


class TestBadTensors:
    """What is wrong with a tensor is said with its file and name; see also test_bad_input."""

    def error(self, folder, config=None, dtype=jnp.bfloat16):
        with pytest.raises(CheckpointError) as caught:
            jq.from_pretrained(folder, config, dtype)
        return str(caught.value)

    @pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("config", [None, CONFIG])
    def test_nan_and_inf(self, tmp_path, weights, name, bad, config):
        weights[name][..., 3] = bad
        message = self.error(builders.checkpoint(tmp_path / "w", weights), config)
        assert f"model.safetensors: tensor {name} holds NaN or Inf" in message

    def test_values_too_large_for_the_dtype(self, tmp_path, weights):
        weights["model.norm.weight"][3] = 1e5
        folder = builders.checkpoint(tmp_path / "w", weights)
        jq.from_pretrained(folder, CONFIG)
        message = self.error(folder, CONFIG, jnp.float16)
        assert "model.norm.weight holds NaN or Inf" in message
        assert "float16" in message

    @pytest.mark.parametrize("where", ["value", "scale"])
    def test_nan_in_fp8(self, tmp_path, weights, where):
        fp8, scales = builders.fp8_weights(weights)
        name = "model.layers.0.mlp.gate_proj.weight"
        if where == "value":
            fp8[name][0, 0] = np.nan
        else:
            scales[name][1, 1] = np.nan
        stored = {f"{n}_scale_inv": scale for n, scale in scales.items()}
        folder = builders.checkpoint(
            tmp_path / "w", {**fp8, **stored}, quantization_config=QUANTIZATION
        )
        assert f"tensor {name} holds NaN or Inf" in self.error(folder)

    def test_fp8_without_scales(self, tmp_path, weights):
        fp8, scales = builders.fp8_weights(weights)
        name = "model.layers.0.mlp.gate_proj.weight"
        stored = {f"{n}_scale_inv": scale for n, scale in scales.items() if n != name}
        folder = builders.checkpoint(
            tmp_path / "w", {**fp8, **stored}, quantization_config=QUANTIZATION
        )
        message = self.error(folder)
        assert f"{name} is FP8 and has no scales; looked for {name}_scale_inv" in message

    def test_scales_of_another_shape(self, tmp_path, weights):
        fp8, scales = builders.fp8_weights(weights)
        name = "model.layers.0.mlp.gate_proj.weight"
        stored = {f"{n}_scale_inv": scale for n, scale in scales.items()}
        stored[f"{name}_scale_inv"] = stored[f"{name}_scale_inv"].T.copy()
        folder = builders.checkpoint(
            tmp_path / "w", {**fp8, **stored}, quantization_config=QUANTIZATION
        )
        message = self.error(folder)
        assert f"{name}_scale_inv has shape [2, 5]" in message
        assert "[5, 2]" in message

    def test_scales_of_what_is_not_fp8(self, tmp_path, weights):
        fp8, scales = builders.fp8_weights(weights)
        name = "model.layers.0.mlp.gate_proj.weight"
        fp8[name] = weights[name]
        stored = {f"{n}_scale_inv": scale for n, scale in scales.items()}
        folder = builders.checkpoint(
            tmp_path / "w", {**fp8, **stored}, quantization_config=QUANTIZATION
        )
        assert f"{name}_scale_inv" in self.error(folder)

    def test_fp8_that_config_json_does_not_mention(self, tmp_path, weights):
        fp8, scales = builders.fp8_weights(weights)
        stored = {f"{n}_scale_inv": scale for n, scale in scales.items()}
        folder = builders.checkpoint(tmp_path / "w", {**fp8, **stored})
        assert "float8_e4m3fn, but config.json says no FP8" in self.error(folder)

    @pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
    def test_fp8_where_no_matmul_reads_it(self, tmp_path, weights, name):
        fp8, scales = builders.fp8_weights(weights)
        fp8[name] = weights[name].astype(builders.E4M3)
        scales[name] = np.ones((9, 2), np.float32)
        stored = {f"{n}_scale_inv": scale for n, scale in scales.items()}
        folder = builders.checkpoint(
            tmp_path / "w", {**fp8, **stored}, quantization_config=QUANTIZATION
        )
        assert f"{name} is FP8; allowed: FP8 weights of projections" in self.error(folder)

    def test_integers(self, tmp_path, weights):
        weights["model.norm.weight"] = np.ones(64, np.int64)
        message = self.error(builders.checkpoint(tmp_path / "w", weights))
        assert "model.norm.weight is int64; allowed: BF16, F16, F32" in message


# 12 layers of 13 M parameters: 318 MB in BF16.
LARGE = {
    **builders.CONFIG,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "vocab_size": 1024,
    "tie_word_embeddings": True,
}


def test_bf16_is_never_whole_in_memory(tmp_path):
    """The peak of anonymous memory (the map of the file is not) above that of a tiny model."""
    rng = np.random.default_rng(0)
    pattern = rng.standard_normal(2**22, np.float32).astype(builders.BF16)
    weights = {name: np.resize(pattern, shape) for name, shape in builders.shapes(LARGE).items()}
    large = builders.checkpoint(tmp_path / "large", weights, config=LARGE)
    small = builders.checkpoint(tmp_path / "small")
    bf16 = sum(w.nbytes for w in weights.values())
    script = """
        import json, sys, threading, time
        import jax
        import jaxquant as jq

        def anonymous():
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) for line in status if "RssAnon" in line) * 1024

        def watch():
            global peak
            while running:
                peak = max(peak, anonymous())
                time.sleep(0.002)

        large, small = sys.argv[1:]
        config = jq.QuantConfig()
        jq.from_pretrained(small, config)
        peak, running = 0, True
        before = anonymous()
        thread = threading.Thread(target=watch)
        thread.start()
        model = jq.from_pretrained(large, config)
        jax.block_until_ready(model.module)
        running = False
        thread.join()
        print(json.dumps({"peak": peak - before, "model": model.nbytes}))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(large), str(small)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    result = json.loads(done.stdout)
    # What is in flight and the code that XLA compiles: 190 MB for a model of any size.
    spare = 250e6
    assert spare < 0.85 * bf16
    assert result["peak"] < result["model"] + spare, result


def test_loading_needs_no_more_than_the_names_say(tmp_path, weights):
    """Shards that hold nothing of the model cannot hide: everything is accounted for."""
    weights["model.layers.2.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"does not have: model\.layers\.2\.mlp"):
        jq.from_pretrained(builders.checkpoint(tmp_path / "w", weights))


@pytest.mark.parametrize("config", [None, CONFIG])
def test_the_report_says_what_it_took(source, config):
    report = jq.from_pretrained(source, config).report
    assert report.timing is not None
    assert report.timing.nbytes == report.bytes_before
    assert report.timing.seconds > 0
    stages = {"read", "transfer", "convert", *(["quantize"] if config else [])}
    assert report.timing.stages.keys() == stages
    assert report.timing.peak_memory is None or report.timing.peak_memory > report.bytes_after


def test_the_bar_says_what_is_read_and_how_fast(source, capsys):
    jq.from_pretrained(source, CONFIG, progress=True)
    bar = capsys.readouterr().err
    assert "Loading bf16" in bar
    assert "B/s" in bar


def test_parameters_lie_on_the_device(source):
    model = jq.from_pretrained(source, CONFIG)
    for leaf in jax.tree.leaves(model.module):
        assert isinstance(leaf, jax.Array)
