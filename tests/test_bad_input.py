"""Whatever is wrong: exit status 1, one line that says what and where, and nothing written."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import builders
import numpy as np
import pytest
from builders import BLOCK

import jaxquant as jq
from jaxquant import cli
from jaxquant.checkpoint.folder import CheckpointFolder
from jaxquant.checkpoint.plan import make_plan
from jaxquant.errors import CheckpointError

ROOT = Path(__file__).parents[1]
UP = "model.layers.1.mlp.up_proj.weight"
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}


@pytest.fixture
def fails(capsys, tmp_path, unchecked):
    """Runs a command that must fail as all failures do; returns its line."""

    def fails(*argv):
        before = sorted(tmp_path.rglob("*"))
        assert cli.main([str(arg) for arg in argv]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("jaxquant: error: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return fails


def copy(folder):
    return Path(shutil.copytree(builders.tiny_checkpoint(), folder))


def sharded(folder):
    return builders.checkpoint(folder, shards=2, tokenizer=True)


def weights_file(folder):
    return folder / "model.safetensors"


def read_file(path):
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def edit_header(folder, edit):
    header, data = read_file(weights_file(folder))
    edit(header)
    builders.save_raw(weights_file(folder), json.dumps(header).encode(), data)


def edit_weights(folder, edit):
    weights = builders.tensors()
    edit(weights)
    builders.save(weights_file(folder), weights)


def missing_shard(folder):
    shutil.rmtree(folder)
    sharded(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def truncated_shard(folder):
    shutil.rmtree(folder)
    path = sharded(folder) / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def index_leads_outside(folder):
    shutil.rmtree(folder)
    index = sharded(folder) / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    builders.edit_json(index, weight_map={**weight_map, UP: "../other/model.safetensors"})


def shard_lacks_a_tensor(folder):
    shutil.rmtree(folder)
    index = sharded(folder) / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    (other,) = {*weight_map.values()} - {weight_map[UP]}
    builders.edit_json(index, weight_map={**weight_map, UP: other})


def header_too_large(folder):
    weights_file(folder).write_bytes((10**12).to_bytes(8, "little") + b"{}")


def header_is_not_json(folder):
    builders.save_raw(weights_file(folder), b"{'a': 1}", b"")


def header_is_a_list(folder):
    builders.save_raw(weights_file(folder), b"[]      ", b"")


def overlapping(folder):
    def edit(header):
        a, b = header[UP], header[UP.replace("layers.1", "layers.0")]
        a["data_offsets"] = b["data_offsets"]

    edit_header(folder, edit)


def out_of_range(folder):
    def edit(header):
        name = "lm_head.weight"
        header[name]["data_offsets"] = [x + 10**6 for x in header[name]["data_offsets"]]

    edit_header(folder, edit)


def unknown_dtype(folder):
    edit_header(folder, lambda header: header[UP].update(dtype="F7"))


def integers(folder):
    edit_weights(folder, lambda w: w.update({UP: np.zeros((160, 64), np.int64)}))


def another_shape(folder):
    edit_weights(folder, lambda w: w.update({UP: w[UP].T.copy()}))


def another_config(folder):
    builders.edit_json(folder / "config.json", hidden_size=128)


def missing_tensors(folder):
    edit_weights(folder, lambda w: w.pop(UP))


def unexpected_tensors(folder):
    edit_weights(folder, lambda w: w.update({UP.replace("1.mlp", "2.mlp"): w[UP]}))


def unprintable_names(folder):
    edit_weights(folder, lambda w: w.update({"a\n\x1b[31mb": w[UP]}))


def nan(folder):
    edit_weights(folder, lambda w: w[UP].__setitem__((3, 5), np.nan))


def inf(folder):
    edit_weights(folder, lambda w: w["model.norm.weight"].__setitem__(7, np.inf))


def config(**changes):
    return lambda folder: builders.edit_json(folder / "config.json", **changes)


def no_config(folder):
    (folder / "config.json").unlink()


def config_is_not_json(folder):
    (folder / "config.json").write_text('{"architectures": [')


def config_is_a_list(folder):
    (folder / "config.json").write_text("[]")


def only(name):
    def edit(folder):
        weights_file(folder).unlink()
        (folder / name).write_bytes(b"\x80\x02K\x01.")

    return edit


def no_weights(folder):
    weights_file(folder).unlink()


def empty_weights(folder):
    weights_file(folder).write_bytes(b"")


def git_lfs_pointer(folder):
    weights_file(folder).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def fp8_without_blocks(folder):
    config(quantization_config={**FP8, "weight_block_size": None})(folder)
    edit_json_null(folder, "weight_block_size")


def edit_json_null(folder, field):
    value = json.loads((folder / "config.json").read_text())
    value["quantization_config"][field] = None
    builders.write_json(folder / "config.json", value)


def fp8_that_is_bf16(folder):
    config(quantization_config=FP8)(folder)


def fp8_without_scales(folder):
    fp8, _ = builders.fp8_weights(builders.tensors())
    builders.save(weights_file(folder), fp8)
    config(quantization_config=FP8)(folder)


# What breaks a checkpoint, and what the line has to say.
BROKEN = [
    (missing_shard, ["shard 'model-00002-of-00002.safetensors' is missing"]),
    (truncated_shard, ["model-00002-of-00002.safetensors: truncated: expected", "the file has"]),
    (index_leads_outside, ["model.safetensors.index.json: file '../other", "outside the folder"]),
    (shard_lacks_a_tensor, ["model-0000", "are not there", UP]),
    (header_too_large, ["model.safetensors: not a safetensors file: header length 1000000000000"]),
    (header_is_not_json, ["model.safetensors: bad header"]),
    (header_is_a_list, ["model.safetensors: not a safetensors file"]),
    (overlapping, ["model.safetensors: tensor", "overlaps"]),
    (out_of_range, ["model.safetensors: tensor 'lm_head.weight'", "hole"]),
    (unknown_dtype, ["model.safetensors", UP, "unknown dtype 'F7'"]),
    (integers, ["model.safetensors", UP, "int64", "allowed: BF16, F16, F32"]),
    (another_shape, ["model.safetensors", UP, "[64, 160]", "config.json asks for [160, 64]"]),
    (another_config, ["model.embed_tokens.weight", "[260, 64]", "asks for [260, 128]"]),
    (missing_tensors, ["missing tensors", UP]),
    (unexpected_tensors, ["architecture does not have", "model.layers.2.mlp.up_proj.weight"]),
    (unprintable_names, ["architecture does not have", r"a\n\x1b[31mb"]),
    (nan, ["model.safetensors", UP, "NaN or Inf"]),
    (inf, ["model.safetensors", "model.norm.weight", "NaN or Inf"]),
    (config(architectures=["Qwen9ForCausalLM"]), ["config.json", "'Qwen9ForCausalLM'", "Llama"]),
    (config(num_attention_heads="4"), ["config.json: num_attention_heads is '4'"]),
    (config(num_hidden_layers=10**18), ["config.json: num_hidden_layers is 1000000000000000000"]),
    (config(rope_scaling={"rope_type": "longrope"}), ["config.json: rope_scaling", "'longrope'"]),
    (config(quantization_config={"quant_method": "awq"}), ["config.json", "'awq'", "BF16"]),
    (config(quantization_config={"quant_method": "gptq", "bits": 4}), ["config.json", "'gptq'"]),
    (config(quantization_config="fp8"), ["config.json: quantization_config is 'fp8'"]),
    (config(quantization_config={**FP8, "fmt": "e3m4"}), ["config.json", "fmt is 'e3m4'"]),
    (config(quantization_config={**FP8, "block": 1}), ["config.json", "block is 1", "no such key"]),
    (config(quantization_config={**FP8, "activation_scheme": "static"}), ["activation_scheme"]),
    (fp8_without_blocks, ["config.json", "weight_block_size is None", "FP8 without blocks"]),
    (fp8_that_is_bf16, ["FP8"]),
    (fp8_without_scales, ["model.safetensors", "is FP8 and has no scales"]),
    (no_config, ["config.json: no such file"]),
    (config_is_not_json, ["config.json: not JSON"]),
    (config_is_a_list, ["config.json: expected a JSON object, got []"]),
    (only("pytorch_model.bin"), ["only pickle checkpoints (pytorch_model.bin)", "never opened"]),
    (only("model.pt"), ["only pickle checkpoints (model.pt)"]),
    (only("model.gguf"), ["only GGUF files (model.gguf)"]),
    (no_weights, ["no weights: expected model.safetensors"]),
    (empty_weights, ["model.safetensors: truncated: the file is empty"]),
    (git_lfs_pointer, ["model.safetensors: a git-lfs pointer"]),
]


@pytest.mark.parametrize("command", ["quantize", "generate"])
@pytest.mark.parametrize(("breaks", "says"), BROKEN)
def test_a_broken_checkpoint(fails, tmp_path, breaks, says, command):
    folder = copy(tmp_path / "source")
    breaks(folder)
    if command == "quantize":
        line = fails("quantize", folder, tmp_path / "fp8", "--block-size", BLOCK)
    else:
        line = fails("generate", folder, "Hello", "--max-new-tokens", 1)
    assert all(words in line for words in says), line


def test_quantizing_what_is_broken_leaves_what_was_there(fails, tmp_path):
    good, folder = copy(tmp_path / "good"), copy(tmp_path / "source")
    nan(folder)
    assert cli.main(["quantize", str(good), str(tmp_path / "fp8"), "--json"]) == 0
    before = (tmp_path / "fp8" / "model.safetensors").read_bytes()
    fails_after = cli.main(["quantize", str(folder), str(tmp_path / "fp8"), "--overwrite"])
    assert fails_after == 1
    assert (tmp_path / "fp8" / "model.safetensors").read_bytes() == before


class TestFP8Checkpoints:
    @pytest.fixture
    def fp8(self, tmp_path):
        fp8, scales = builders.fp8_weights(builders.tensors())
        scales = {f"{name}_scale_inv": scale for name, scale in scales.items()}
        return builders.checkpoint(
            tmp_path / "fp8", {**fp8, **scales}, tokenizer=True, quantization_config=FP8
        )

    def test_another_block_size(self, fails, fp8, tmp_path):
        for argv in (
            ("quantize", fp8, tmp_path / "out"),
            ("generate", fp8, "Hello", "--fp8"),
            ("bench", fp8, "--block-size", "64", "--prompt-tokens", 2, "--new-tokens", 2),
        ):
            line = fails(*argv)
            assert "blocks of 32x32" in line
            assert "was asked for" in line

    def test_the_same_again(self, fails, fp8, tmp_path):
        line = fails("quantize", fp8, tmp_path / "out", "--block-size", BLOCK)
        assert f"{fp8}: the checkpoint is FP8 already" in line


class TestDestinations:
    @pytest.fixture
    def source(self):
        return builders.tiny_checkpoint()

    def test_a_file(self, fails, source, tmp_path):
        (tmp_path / "out").write_text("mine")
        assert f"{tmp_path / 'out'}: a file" in fails("quantize", source, tmp_path / "out")

    @pytest.mark.parametrize("options", [(), ("--overwrite",)])
    def test_a_folder_of_other_things(self, fails, source, tmp_path, options):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("mine")
        assert "not empty" in fails("quantize", source, tmp_path / "out", *options)

    def test_a_path_below_a_file(self, fails, source, tmp_path):
        (tmp_path / "file").write_text("mine")
        assert "file/out: cannot be written" in fails("quantize", source, tmp_path / "file/out")

    def test_the_source_itself(self, fails, tmp_path):
        folder = copy(tmp_path / "source")
        assert f"{folder}: not empty" in fails("quantize", folder, folder)

    def test_a_full_disk(self, source, tmp_path):
        """A limit on the size of files stands for one."""
        code = (
            "import resource, sys\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
            "from jaxquant import cli\n"
            "sys.exit(cli.main(sys.argv[1:]))\n"
        )
        command = [sys.executable, "-c", code, "quantize", str(source), str(tmp_path / "out/fp8")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 1
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert f"{tmp_path / 'out/fp8'}: cannot be written: " in line
        assert "bytes are needed" in line
        assert list((tmp_path / "out").iterdir()) == []


class TestSources:
    @pytest.mark.parametrize("command", ["quantize", "inspect", "generate", "eval", "bench"])
    def test_no_folder(self, fails, tmp_path, command):
        rest = {
            "quantize": [tmp_path / "out"],
            "generate": ["Hello"],
            "eval": ["--text", __file__],
        }
        line = fails(command, tmp_path / "missing", *rest.get(command, []))
        assert f"{tmp_path / 'missing'}: no such folder" in line

    def test_a_file(self, fails):
        path = builders.tiny_checkpoint() / "model.safetensors"
        assert f"{path}: a file; give the folder" in fails("inspect", path)

    def test_neither_path_nor_hub_id(self, fails):
        assert "neither an existing folder nor a hub id" in fails("inspect", "a b")


class TestGenerate:
    def fails(self, fails, *argv, source=None):
        return fails("generate", source or builders.tiny_checkpoint(), *argv)

    def test_no_tokenizer(self, fails, tmp_path):
        folder = builders.checkpoint(tmp_path / "w")
        assert f"{folder}/tokenizer.json: no such file" in self.fails(fails, "Hi", source=folder)

    def test_a_broken_tokenizer(self, fails, tmp_path):
        folder = copy(tmp_path / "w")
        (folder / "tokenizer.json").write_text('{"model": 5}\n')
        assert "tokenizer.json: not a tokenizer" in self.fails(fails, "Hi", source=folder)

    def test_a_prompt_longer_than_the_context(self, fails):
        line = self.fails(fails, "long " * 30)
        assert "prompt 0 has 150 tokens; the context of the model is 96" in line

    def test_an_empty_prompt(self, fails):
        assert "prompt 0 is empty" in self.fails(fails, "")

    @pytest.mark.parametrize(
        "template",
        [
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ cycler.__init__.__globals__.os.popen('touch owned').read() }}",
            "{% for m in messages %}{{ m.__class__ }}{% endfor %}",
        ],
    )
    def test_a_template_that_reaches_out_of_the_sandbox(self, fails, tmp_path, template):
        folder = builders.checkpoint(tmp_path / "w", tokenizer=True, chat_template=template)
        line = self.fails(fails, "Hi", source=folder)
        assert "tokenizer_config.json: unsafe" in line
        assert not os.path.exists("owned")

    def test_a_template_of_several_lines_fails_in_one(self, fails, tmp_path):
        template = "{{ raise_exception('no\nsuch\nthing') }}"
        folder = builders.checkpoint(tmp_path / "w", tokenizer=True, chat_template=template)
        assert "no such thing" in self.fails(fails, "Hi", source=folder)

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (["--temperature", "-1"], "temperature is -1.0; allowed: a number from 0.0"),
            (["--temperature", "nan"], "temperature is nan"),
            (["--top-k", "-1"], "top_k is -1; allowed: an integer from 0"),
            (["--top-p", "0"], "top_p is 0.0"),
            (["--min-p", "1.5"], "min_p is 1.5"),
            (["--repetition-penalty", "0"], "repetition_penalty is 0.0"),
            (["--seed", "-1"], "seed is -1"),
            (["--stop", ""], "stop string: got ''"),
            (["--max-new-tokens", "0"], "max_new_tokens is 0; allowed: a positive integer"),
            (
                ["--fp8", "--block-size", "0"],
                "weight_block_size is (0, 0); allowed: a positive int",
            ),
            (["--fp8", "--keep", "model"], "no tensor would be quantized"),
            (["--block-size", "64"], "without --fp8"),
        ],
    )
    def test_options_out_of_range(self, fails, options, says):
        assert says in self.fails(fails, "Hi", *options)


class TestEval:
    def fails(self, fails, path, *argv):
        return fails("eval", builders.tiny_checkpoint(), "--text", path, *argv)

    def test_no_text(self, fails, tmp_path):
        assert str(tmp_path / "missing.txt") in self.fails(fails, tmp_path / "missing.txt")
        assert str(tmp_path) in self.fails(fails, tmp_path)

    def test_text_that_is_not_utf8(self, fails, tmp_path):
        path = tmp_path / "latin1.txt"
        path.write_bytes("Grüße".encode("latin-1"))
        assert f"{path}: not UTF-8 text" in self.fails(fails, path)

    @pytest.mark.parametrize(
        ("text", "options", "says"),
        [
            ("", [], "the text has 0 tokens"),
            ("a", [], "the text has 1 tokens"),
            ("short", ["--windows", "2"], "the text has 5 tokens; 2 windows of 1024 tokens need"),
            ("long " * 40, [], "a window has 200 tokens; the context of the model is 96"),
            ("long " * 40, ["--window", "1"], "windows of 1 tokens; allowed: at least 1 window"),
            ("long " * 40, ["--window", "20", "--windows", "-1"], "-1 windows of 20 tokens"),
            ("long " * 4, ["--block-size", "0"], "weight_block_size is (0, 0)"),
        ],
    )
    def test_windows(self, fails, tmp_path, text, options, says):
        path = tmp_path / "text.txt"
        path.write_text(text)
        assert says in self.fails(fails, path, *options)


ODD = [True, 0, -1, 1.5, 10**30, "x", "", [], {}, [1], ["x"], {"a": 1}, math.nan, math.inf, [[]]]
FIELDS = [
    *builders.CONFIG,
    "head_dim",
    "hidden_act",
    "sliding_window",
    "rope_scaling",
    "rope_parameters",
    "attention_bias",
    "partial_rotary_factor",
    "quantization_config",
    "compression_config",
]


@pytest.mark.parametrize("field", FIELDS)
def test_odd_values_in_config_json_raise_nothing_else(tmp_path, field):
    """A plan, or a CheckpointError that is one line."""
    folder = copy(tmp_path / "w")
    for value in [None, *ODD]:
        builders.write_json(folder / "config.json", {**builders.CONFIG, field: value})
        assert_plan_or_error(folder)


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}),
        ("rope_parameters", {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}),
        ("quantization_config", {**FP8, "scale_fmt": None, "modules_to_not_convert": []}),
        ("quantization_config", {"quant_method": "compressed-tensors", "config_groups": {}}),
    ],
)  # fmt: skip
def test_odd_values_below_raise_nothing_else(tmp_path, outer, inner):
    folder = copy(tmp_path / "w")
    for field in inner:
        for value in [None, *ODD]:
            nested = {**inner, field: value}
            builders.write_json(folder / "config.json", {**builders.CONFIG, outer: nested})
            assert_plan_or_error(folder)


def test_odd_compressed_tensors_raise_nothing_else(tmp_path):
    folder = copy(tmp_path / "w")
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 32]}
    for value in [None, *ODD]:
        for group in (
            value,
            {"weights": value},
            {"weights": weights, "input_activations": value},
            *({"weights": {**weights, field: value}} for field in weights),
        ):
            quantization = {"quant_method": "compressed-tensors", "config_groups": {"g": group}}
            config = {**builders.CONFIG, "quantization_config": quantization}
            builders.write_json(folder / "config.json", config)
            assert_plan_or_error(folder)


def assert_plan_or_error(path):
    for quantization in (None, jq.QuantConfig()):
        with CheckpointFolder(path) as folder:
            try:
                make_plan(folder, quantization)
            except CheckpointError as error:
                message = str(error)
            else:
                continue
            assert "\n" not in message
