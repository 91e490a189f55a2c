"""Export: a stream and a loaded model give the same files, which say all there is to know."""

import dataclasses
import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import builders
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from builders import BLOCK, is_projection
from flax import nnx

import jaxquant as jq
from jaxquant.checkpoint.folder import CheckpointFolder
from jaxquant.checkpoint.verify import verify
from jaxquant.errors import CheckpointError, JaxquantError

CONFIG = jq.QuantConfig(weight_block_size=builders.BLOCKS)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def weights():
    return builders.tensors()


@pytest.fixture
def source(tmp_path, weights):
    return builders.checkpoint(tmp_path / "bf16", weights, tokenizer=True)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (CONFIG, {}),
        (dataclasses.replace(CONFIG, scale_fmt="ue8m0"), {"tie_word_embeddings": True}),
        (jq.QuantConfig(fmt="e5m2"), {"torch_dtype": None, "dtype": "bfloat16"}),
        (
            dataclasses.replace(
                CONFIG, activation_scheme=None, modules_to_not_convert=("layers.0.mlp", "o_proj")
            ),
            {},
        ),
    ],
)
def test_the_stream_writes_what_the_loaded_model_does(tmp_path, config, changes):
    hf_config = {k: v for k, v in {**builders.CONFIG, **changes}.items() if v is not None}
    source = builders.checkpoint(tmp_path / "bf16", config=hf_config, tokenizer=True)
    report = jq.quantize_checkpoint(source, tmp_path / "stream", config)
    model = jq.from_pretrained(source, config)
    assert jq.save_pretrained(model, tmp_path / "model") == tmp_path / "model"
    assert files(tmp_path / "stream") == files(tmp_path / "model")
    assert report == model.report


def test_content(tmp_path, source, weights):
    jq.quantize_checkpoint(source, tmp_path / "fp8", CONFIG)
    stored = builders.load(tmp_path / "fp8")
    for name, w in weights.items():
        if is_projection(name):
            qa = jq.quantize(w, CONFIG)
            qvalue, scale = np.asarray(qa.qvalue), np.asarray(qa.scale)
            assert stored.pop(name) == ("F8_E4M3", list(w.shape), qvalue.tobytes())
            assert stored.pop(f"{name}_scale_inv") == ("F32", list(scale.shape), scale.tobytes())
        else:
            assert stored.pop(name) == ("BF16", list(w.shape), w.tobytes())
    assert not stored
    assert config_of(tmp_path / "fp8") == {
        **builders.CONFIG,
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": ["lm_head"],
        },
    }
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "fp8" / name).read_bytes() == (source / name).read_bytes()
    with safetensors.safe_open(tmp_path / "fp8" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_report_says_what_it_took(tmp_path, source):
    timing = jq.quantize_checkpoint(source, tmp_path / "fp8", CONFIG).timing
    assert timing is not None
    assert timing.stages.keys() == {"read", "transfer", "convert", "quantize", "write"}
    assert timing.nbytes == sum(w.nbytes for w in builders.tensors().values())


def test_compressed_tensors(tmp_path, source):
    jq.quantize_checkpoint(source, tmp_path / "fp8", CONFIG)
    jq.quantize_checkpoint(source, tmp_path / "ct", CONFIG, layout="compressed-tensors")
    a, b = (CheckpointFolder(tmp_path / name) for name in ("fp8", "ct"))
    names = {name: name.replace("_scale_inv", "_scale") for name in a.names}
    assert set(names.values()) == set(b.names)
    for name, other in names.items():
        assert a.read(name).tobytes() == b.read(other).tobytes()
    fields = b.config["quantization_config"]
    weights = fields["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["block_structure"]) == ("block", list(builders.BLOCKS))
    assert fields["ignore"] == a.config["quantization_config"]["modules_to_not_convert"]
    tokens = np.arange(8, dtype=np.int32)[None]
    model = jq.from_pretrained(tmp_path / "ct")
    assert model.quant_config == CONFIG
    assert np.array_equal(model(tokens), jq.from_pretrained(tmp_path / "fp8")(tokens))
    verify(source, tmp_path / "ct")


@pytest.mark.parametrize(
    ("layout", "config", "message"),
    [
        ("gguf", CONFIG, "layout is 'gguf'; allowed: fp8, compressed-tensors"),
        (
            "compressed-tensors",
            dataclasses.replace(CONFIG, fmt="e5m2"),
            "layout 'compressed-tensors': fmt is 'e5m2'; allowed: 'e4m3'; take layout 'fp8'",
        ),
        (
            "compressed-tensors",
            dataclasses.replace(CONFIG, scale_fmt="ue8m0"),
            "layout 'compressed-tensors': scale_fmt is 'ue8m0'; allowed: None; take layout 'fp8'",
        ),
    ],
)
def test_a_layout_that_is_not_written(tmp_path, source, layout, config, message):
    with pytest.raises(JaxquantError) as caught:
        jq.quantize_checkpoint(source, tmp_path / "out", config, layout=layout)
    assert str(caught.value) == message
    assert not (tmp_path / "out").exists()


def test_what_is_kept_is_written_with_full_paths(tmp_path, source):
    config = dataclasses.replace(CONFIG, modules_to_not_convert=("layers.1.self_attn", "up_proj"))
    jq.quantize_checkpoint(source, tmp_path / "fp8", config)
    quantization = config_of(tmp_path / "fp8")["quantization_config"]
    assert sorted(quantization["modules_to_not_convert"]) == [
        "lm_head",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
        *(f"model.layers.1.self_attn.{name}_proj" for name in "koqv"),
    ]
    again = jq.from_pretrained(tmp_path / "fp8")
    assert again.quant_config == jq.QuantConfig.from_dict(quantization)
    assert jq.from_pretrained(tmp_path / "fp8", again.quant_config).report == again.report


def test_a_tied_head_is_listed_as_kept(tmp_path):
    source = builders.checkpoint(
        tmp_path / "bf16", config={**builders.CONFIG, "tie_word_embeddings": True}
    )
    jq.quantize_checkpoint(source, tmp_path / "fp8", CONFIG)
    quantization = config_of(tmp_path / "fp8")["quantization_config"]
    assert quantization["modules_to_not_convert"] == ["lm_head"]


@pytest.mark.parametrize("config", [None, CONFIG])
def test_saving_what_was_loaded_changes_nothing(tmp_path, source, weights, config):
    model = jq.from_pretrained(source, config)
    model.save_pretrained(tmp_path / "one")
    again = jq.from_pretrained(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    if config is None:
        assert config_of(tmp_path / "one") == builders.CONFIG
        stored = {name: data for name, (_, _, data) in builders.load(tmp_path / "one").items()}
        assert stored == {name: w.tobytes() for name, w in weights.items()}


def test_shards_hold_the_same(tmp_path, source):
    jq.quantize_checkpoint(source, tmp_path / "one", CONFIG)
    jq.quantize_checkpoint(source, tmp_path / "many", CONFIG, max_shard_bytes=30_000)
    shards = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3
    assert builders.load(tmp_path / "one") == builders.load(tmp_path / "many")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == builders.load(tmp_path / "one").keys()
    assert sorted(set(index["weight_map"].values())) == shards
    tokens = np.arange(8, dtype=np.int32)[None]
    one, many = (jq.from_pretrained(tmp_path / name) for name in ("one", "many"))
    assert np.array_equal(one(tokens), many(tokens))


def test_float32_sources_keep_float32_where_they_are_not_quantized(tmp_path):
    weights = builders.tensors(dtype=np.dtype(np.float32))
    source = builders.checkpoint(tmp_path / "f32", weights, torch_dtype="float32")
    jq.quantize_checkpoint(source, tmp_path / "fp8", CONFIG)
    stored = builders.load(tmp_path / "fp8")
    assert stored["model.norm.weight"][0] == "F32"
    qa = jq.quantize(weights["model.layers.0.mlp.up_proj.weight"], CONFIG)
    data = np.asarray(qa.qvalue).tobytes()
    assert stored["model.layers.0.mlp.up_proj.weight"][2] == data


def test_a_saved_model_says_its_dtype(tmp_path, source):
    model = jq.from_pretrained(source, CONFIG, jnp.float32)
    model.save_pretrained(tmp_path / "f32")
    assert config_of(tmp_path / "f32")["torch_dtype"] == "float32"
    assert builders.load(tmp_path / "f32")["model.norm.weight"][0] == "F32"


def test_fp8_sources_are_not_quantized_again(tmp_path, source):
    jq.quantize_checkpoint(source, tmp_path / "fp8", CONFIG)
    with pytest.raises(CheckpointError, match="fp8: the checkpoint is FP8 already"):
        jq.quantize_checkpoint(tmp_path / "fp8", tmp_path / "again", CONFIG)
    with pytest.raises(CheckpointError, match=r"is FP8 already .*128x128"):
        jq.quantize_checkpoint(tmp_path / "fp8", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_folder_that_is_there_stays_unless_told_otherwise(tmp_path, source):
    jq.quantize_checkpoint(source, tmp_path / "fp8", CONFIG)
    before = files(tmp_path / "fp8")
    model = jq.from_pretrained(source)
    with pytest.raises(CheckpointError, match="fp8: not empty"):
        jq.save_pretrained(model, tmp_path / "fp8")
    assert files(tmp_path / "fp8") == before
    jq.save_pretrained(model, tmp_path / "fp8", overwrite=True)
    assert jq.from_pretrained(tmp_path / "fp8").quant_config is None


def test_a_model_can_be_saved_over_its_own_checkpoint(tmp_path, source):
    jq.from_pretrained(source, CONFIG).save_pretrained(source, overwrite=True)
    assert jq.from_pretrained(source).quant_config is not None
    assert (source / "tokenizer.json").exists()


@pytest.mark.parametrize("tensors_before", [0, 5, 20])
def test_a_process_killed_in_the_middle_leaves_nothing_that_looks_finished(
    tmp_path, source, tensors_before
):
    script = f"""
        import os, signal, sys
        import jaxquant as jq
        from jaxquant.checkpoint import stream

        seen = 0

        def report_then_die(*args, report=stream.tensor_report):
            global seen
            seen += 1
            if seen > {tensors_before}:
                os.kill(os.getpid(), signal.SIGKILL)
            return report(*args)

        stream.tensor_report = report_then_die
        config = jq.QuantConfig(weight_block_size={BLOCK})
        jq.quantize_checkpoint(*sys.argv[1:], config, max_shard_bytes=30_000)
    """
    directory = tmp_path / "out" / "fp8"
    command = [sys.executable, "-c", textwrap.dedent(script), str(source), str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not directory.exists()
    (partial,) = (tmp_path / "out").iterdir()
    assert partial.name.startswith(".")
    assert not (partial / "config.json").exists()
    with pytest.raises(CheckpointError):
        jq.from_pretrained(partial)
    jq.quantize_checkpoint(source, directory, CONFIG)  # and it can be done again
    assert jq.from_pretrained(directory).quant_config == dataclasses.replace(
        CONFIG, modules_to_not_convert=("lm_head",)
    )


class TestParameterTrees:
    def params(self):
        rng = np.random.default_rng(0)
        return {
            "mlp": {
                "kernel": rng.standard_normal((96, 160), np.float32),
                "bias": np.zeros(160, np.float32),
            },
            "head": {"kernel": rng.standard_normal((160, 8), np.float32)},
        }

    def test_a_tree_becomes_a_file_of_k_major_weights(self, tmp_path):
        params, _ = jq.quantize_tree(self.params(), CONFIG)
        folder = jq.save_pretrained(params, tmp_path / "tree")
        qa = params["mlp"]["kernel"]
        qvalue, scale = np.asarray(qa.qvalue).tobytes(), np.asarray(qa.scale).tobytes()
        assert builders.load(folder) == {
            "head.kernel": ("F32", [160, 8], self.params()["head"]["kernel"].tobytes()),
            "mlp.bias": ("F32", [160], bytes(640)),
            "mlp.weight": ("F8_E4M3", [160, 96], qvalue),
            "mlp.weight_scale_inv": ("F32", [5, 3], scale),
        }
        quantization = config_of(folder)["quantization_config"]
        assert jq.QuantConfig.from_dict(quantization) == dataclasses.replace(
            CONFIG, modules_to_not_convert=("head",)
        )

    def test_an_nnx_state(self, tmp_path):
        model = nnx.Linear(64, 96, rngs=nnx.Rngs(0))
        params, _ = jq.quantize_tree(nnx.state(model), CONFIG, rules=["kernel"])
        stored = builders.load(jq.save_pretrained(params, tmp_path / "tree"))
        assert {name: shape for name, (_, shape, _) in stored.items()} == {
            "bias": [96],
            "weight": [96, 64],
            "weight_scale_inv": [3, 2],
        }

    def test_several_dimensions_are_one_as_elsewhere(self, tmp_path):
        rng = np.random.default_rng(0)
        params = {
            "query": {"kernel": rng.standard_normal((64, 4, 24), np.float32)},
            "out": {"kernel": rng.standard_normal((4, 24, 64), np.float32)},
        }
        params, _ = jq.quantize_tree(params, CONFIG)
        stored = builders.load(jq.save_pretrained(params, tmp_path / "tree"))
        assert {name: shape for name, (_, shape, _) in stored.items()} == {
            "query.weight": [96, 64],
            "query.weight_scale_inv": [3, 2],
            "out.weight": [64, 96],
            "out.weight_scale_inv": [2, 3],
        }

    def test_a_tree_that_is_not_quantized(self, tmp_path):
        folder = jq.save_pretrained(self.params(), tmp_path / "tree")
        assert config_of(folder) == {}
        assert builders.load(folder).keys() == {"mlp.kernel", "mlp.bias", "head.kernel"}

    @pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
    def test_scales_that_happen_to_be_powers_of_two_say_nothing(self, tmp_path, scale_fmt):
        """A block whose amax is 448 / 2^k has such a scale in either format."""
        config = dataclasses.replace(CONFIG, scale_fmt=scale_fmt)
        one = np.full((BLOCK, BLOCK), 1.75, np.float32)
        params = {"a": {"weight": one}, "b": {"weight": one * 1.1}}
        params, _ = jq.quantize_tree(params, config)
        folder = jq.save_pretrained(params, tmp_path / "tree")
        assert config_of(folder)["quantization_config"].get("scale_fmt") == scale_fmt

    def test_two_configs_are_an_error_that_says_both(self, tmp_path):
        w = np.ones((64, 64), np.float32)
        params = {"a": jq.quantize(w, CONFIG), "b": jq.quantize(w, jq.QuantConfig(fmt="e5m2"))}
        with pytest.raises(JaxquantError, match=r"a: e4m3, blocks of 32x32.*b: e5m2, .*128x128"):
            jq.save_pretrained(params, tmp_path / "tree")
        assert not (tmp_path / "tree").exists()

    @pytest.mark.parametrize("leaf", [1.5, "text"])
    def test_what_is_no_array_is_named(self, tmp_path, leaf):
        with pytest.raises(JaxquantError, match=r"^a\.b: (float|str); allowed: arrays"):
            jq.save_pretrained({"a": {"b": leaf}}, tmp_path / "tree")
