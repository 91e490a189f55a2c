"""Each command in process: what it prints, what it returns, how it fails."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import builders
import pytest
from builders import BLOCK

import jaxquant as jq
from jaxquant import cli
from jaxquant.checkpoint import writer
from jaxquant.errors import CheckpointError, JaxquantError

ROOT = Path(__file__).parents[1]
COMMANDS = ("demo", "quantize", "verify", "inspect", "generate", "eval", "bench")
BLOCKS = ("--block-size", str(BLOCK))


@pytest.fixture(scope="module")
def source():
    return str(builders.tiny_checkpoint())


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8") / "checkpoint"
    jq.quantize_checkpoint(
        builders.tiny_checkpoint(), folder, jq.QuantConfig(weight_block_size=builders.BLOCKS)
    )
    return str(folder)


@pytest.fixture
def run(capsys):
    """Runs a command that succeeds and says nothing on stderr; returns what it printed."""

    def run(*argv):
        assert cli.main(argv) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return run


@pytest.fixture
def fails(capsys):
    """Runs a command that fails in one line; returns it."""

    def fails(*argv):
        assert cli.main(argv) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith("jaxquant: error: ")
        return err.removeprefix("jaxquant: error: ").rstrip("\n")

    return fails


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(f"\n    {command} " in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: jaxquant {command} " in out
    assert "--debug" in out
    assert ("--json" in out) == (command != "demo")


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"jaxquant {jq.__version__}\n"


@pytest.mark.parametrize(
    "argv",
    [
        ["unknown"],
        ["inspect"],
        ["quantize", "SRC"],
        ["generate", "DIR", "Hi", "--dtype", "int8"],
        ["generate", "DIR", "Hi", "--temperature", "hot"],
        ["generate", "DIR", "Hi", "--cache-dtype", "int8"],
        ["quantize", "SRC", "DST", "--fmt", "e3m4"],
        ["quantize", "SRC", "DST", "--block-size", "64x"],
        ["quantize", "SRC", "DST", "--block-size", "a"],
        ["quantize", "SRC", "DST", "--max-shard-size", "0"],
        ["quantize", "SRC", "DST", "--max-shard-size", "5 apples"],
        ["verify", "SRC"],
        ["eval"],
    ],
)
def test_wrong_usage_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert "usage: jaxquant" in capsys.readouterr().err


def test_no_command_shows_the_help(capsys):
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert all(f"\n    {command} " in err for command in COMMANDS)


class TestQuantize:
    def test_writes_what_the_library_does(self, run, source, fp8, tmp_path):
        out = run("quantize", *BLOCKS, source, str(tmp_path / "fp8"))
        for path in Path(fp8).iterdir():
            assert (tmp_path / "fp8" / path.name).read_bytes() == path.read_bytes()
        assert "14 tensors in FP8" in out
        assert out.endswith(f"written to {tmp_path / 'fp8'}\n")

    def test_a_note_says_that_blocks_are_not_whole(self, run, source, tmp_path):
        assert "note: 14 weights do not divide" in run("quantize", source, str(tmp_path / "a"))
        out = run("quantize", source, str(tmp_path / "b"), "--block-size", "1")
        assert "note:" not in out

    def test_json_is_the_report(self, run, source, tmp_path):
        report = json.loads(run("quantize", source, str(tmp_path / "fp8"), "--json"))
        assert len(report["tensors"]) == len(builders.shapes())
        assert sum(t["quantized"] for t in report["tensors"]) == 14
        assert report["bytes_after"] < report["bytes_before"]

    def test_options(self, run, source, tmp_path):
        run(
            "quantize", source, str(tmp_path / "fp8"), "--block-size", "16x48", "--fmt", "e5m2",
            "--scale-fmt", "ue8m0", "--keep", "layers.0.mlp", "--keep", "o_proj",
        )  # fmt: skip
        config = jq.from_pretrained(tmp_path / "fp8").quant_config
        assert config is not None
        assert (config.weight_block_size, config.fmt, config.scale_fmt) == (
            (16, 48),
            "e5m2",
            "ue8m0",
        )
        assert set(config.modules_to_not_convert) == {
            "lm_head",
            "model.layers.0.self_attn.o_proj",
            "model.layers.1.self_attn.o_proj",
            *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")),
        }

    @pytest.mark.parametrize("size", ["50000", "50kB", "0.05 MB", "48.8KiB"])
    def test_shards_of_a_size(self, run, source, tmp_path, size):
        run("quantize", *BLOCKS, source, str(tmp_path / "fp8"), "--max-shard-size", size)
        assert len(list((tmp_path / "fp8").glob("*.safetensors"))) == 4

    def test_resume(self, run, fails, source, fp8, tmp_path, monkeypatch):
        argv = ("quantize", *BLOCKS, source, str(tmp_path / "fp8"), "--resume")
        with monkeypatch.context() as patch:
            patch.setattr(writer, "_verify", lambda *_: (_ for _ in ()).throw(JaxquantError("x")))
            assert fails(*argv) == "x"
        (shard,) = tmp_path.glob(".fp8.*/*.safetensors")
        written = shard.stat().st_mtime_ns
        run(*argv)
        assert (tmp_path / "fp8" / shard.name).stat().st_mtime_ns == written
        for path in Path(fp8).iterdir():
            assert (tmp_path / "fp8" / path.name).read_bytes() == path.read_bytes()

    def test_overwrite(self, run, fails, source, tmp_path):
        directory = tmp_path / "fp8"
        run("quantize", *BLOCKS, source, str(directory))
        assert f"{directory}: not empty" in fails("quantize", source, str(directory))
        run("quantize", source, str(directory), "--overwrite")
        quantization = json.loads((directory / "config.json").read_text())["quantization_config"]
        assert quantization["weight_block_size"] == [128, 128]


class TestVerify:
    def test_what_was_written(self, run, source, fp8):
        out = run("verify", source, fp8)
        assert "14 tensors in FP8" in out
        assert out.endswith(f"{fp8} holds what follows from {source}, to the byte\n")
        report = json.loads(run("verify", source, fp8, "--json"))
        assert len(report["tensors"]) == len(builders.shapes())
        assert report["timing"]["nbytes"] == report["bytes_before"]

    def test_what_differs_is_named(self, fails, source, fp8, tmp_path):
        folder = Path(shutil.copytree(fp8, tmp_path / "fp8"))
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            last = file.read(1)
            file.seek(-1, 2)
            file.write(bytes([last[0] ^ 1]))
        message = fails("verify", source, str(folder))
        assert message.startswith(f"{folder / 'model.safetensors'}: tensor model.layers.1.mlp.")
        assert "has other values than follow from its source" in message


class TestInspect:
    def test_a_bf16_checkpoint(self, run, source):
        out = run("inspect", source)
        assert "architecture: LlamaForCausalLM\n" in out
        assert "quantization: none" in out
        assert "model.layers.*.mlp.down_proj.weight" in out

    def test_json(self, run, fp8):
        result = json.loads(run("inspect", fp8, "--json"))
        assert result["supported"]
        assert result["quantization"]["weight_block_size"] == [BLOCK, BLOCK]
        tensors = {t["name"]: t for t in result["tensors"]}
        stored = builders.load(Path(fp8))
        assert tensors.keys() == stored.keys()
        for name, (_, shape, data) in stored.items():
            assert (tensors[name]["shape"], tensors[name]["bytes"]) == (shape, len(data))
        assert tensors["model.layers.0.mlp.up_proj.weight"]["dtype"] == "float8_e4m3fn"

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"architectures": ["FooForCausalLM"]}, "'FooForCausalLM' is not supported"),
            ({"architectures": [["Foo"]]}, "is not supported"),
            ({"quantization_config": {"quant_method": "awq"}}, "quantized with 'awq'"),
            ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ],
    )
    def test_what_is_not_supported_is_shown_all_the_same(self, run, tmp_path, changes, why):
        folder = str(builders.checkpoint(tmp_path / "w", **changes))
        result = json.loads(run("inspect", folder, "--json"))
        assert not result["supported"]
        assert why in result["why_not"]
        out = run("inspect", folder)
        assert " (unsupported)\n" in out
        assert why in out
        assert "model.layers.*.mlp.down_proj.weight" in out


class TestGenerate:
    def test_streams_the_pipelines_text(self, run, source):
        text = jq.pipeline(source)("Hello", max_new_tokens=12).text
        assert run("generate", source, "Hello", "--max-new-tokens", "12") == text + "\n"

    def test_json_is_the_response(self, run, source):
        options = {"max_new_tokens": 12, "temperature": 0.9, "top_k": 40, "top_p": 0.95}
        options |= {"min_p": 0.01, "repetition_penalty": 1.1, "seed": 7}
        argv = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        response = json.loads(run("generate", source, "Hello", "--json", "--stop", "\x00", *argv))
        expected = jq.pipeline(source)("Hello", stop=["\x00"], **options)
        assert response == {
            "text": expected.text,
            "finish_reason": expected.finish_reason,
            "token_ids": expected.token_ids,
            "input_token_len": 5,
        }

    def test_fp8_online_is_the_fp8_checkpoint(self, run, source, fp8):
        argv = ("Hello", "--max-new-tokens", "12", "--json")
        online = run("generate", source, *argv, "--fp8", *BLOCKS)
        assert online == run("generate", fp8, *argv)
        assert online != run("generate", source, *argv, "--fp8", *BLOCKS, "--fmt", "e5m2")

    @pytest.mark.parametrize("option", ["cache_dtype", "attention_dtype"])
    def test_a_cache_and_attention_in_fp8(self, run, source, option):
        argv = ("generate", source, "Hello", "--max-new-tokens", "12", "--json")
        response = json.loads(run(*argv, f"--{option.replace('_', '-')}", "float8_e4m3fn"))
        expected = jq.pipeline(source)("Hello", max_new_tokens=12, **{option: "float8_e4m3fn"})
        assert response["token_ids"] == expected.token_ids

    def test_chat_template_and_plain(self, run, tmp_path):
        folder = str(
            builders.checkpoint(
                tmp_path / "w", tokenizer=True, chat_template=builders.CHAT_TEMPLATE
            )
        )
        argv = ("generate", folder, "Hello", "--max-new-tokens", "2", "--json")
        assert json.loads(run(*argv))["input_token_len"] > 20
        assert json.loads(run(*argv, "--plain"))["input_token_len"] == 5

    @pytest.mark.parametrize(
        "option",
        [
            ("--block-size", "64"),
            ("--weight-only",),
            ("--keep", "q_proj"),
            ("--fmt", "e5m2"),
            ("--head",),
        ],
    )
    def test_options_of_the_quantization_need_fp8(self, fails, source, option):
        assert "without --fp8; add --fp8" in fails("generate", source, "Hello", *option)


class TestEval:
    @pytest.fixture
    def text(self, tmp_path):
        path = tmp_path / "text.txt"
        path.write_text("Grüße, Alice. " * 20, encoding="utf-8")
        return ("--text", str(path), "--window", "20", "--windows", "2")

    def test_table_and_json(self, run, source, text):
        assert "FP8 W8A8" in run("eval", source, *text, *BLOCKS)
        rows = json.loads(run("eval", source, *text, *BLOCKS, "--json"))["rows"]
        assert [row["name"] for row in rows] == ["bfloat16", "FP8 W8A8"]
        assert rows[0]["evaluation"]["kl"] is None
        assert rows[1]["evaluation"]["kl"] > 0
        assert rows[1]["evaluation"]["tokens"] == 38

    def test_an_fp8_checkpoint(self, run, source, fp8, text):
        (row,) = json.loads(run("eval", fp8, *text, "--json"))["rows"]
        assert row["evaluation"]["kl"] is None
        rows = json.loads(run("eval", fp8, *text, "--against", source, "--json"))["rows"]
        assert [row["name"] for row in rows] == ["bfloat16", "FP8 W8A8"]
        assert rows[1]["evaluation"]["perplexity"] == row["evaluation"]["perplexity"]


def test_bench(run, source):
    argv = ("bench", source, "--prompt-tokens", "4", "--new-tokens", "3", *BLOCKS)
    result = json.loads(run(*argv, "--json", "--cache-dtype", "float8_e4m3fn"))
    names = ["bfloat16", "FP8 W8A8", "FP8 W8A8, FP8 cache"]
    assert [t["name"] for t in result["timings"]] == names
    assert result["prompt_tokens"] == 4


def test_tuning_asks_for_a_gpu(fails, source):
    argv = ("bench", source, "--prompt-tokens", "4", "--new-tokens", "3", "--tune")
    assert fails(*argv) == "tune: the device is cpu; allowed: Hopper GPUs"


class TestDemo:
    # matplotlib 3.10.0 with a pyparsing that is newer.
    @pytest.mark.filterwarnings("ignore:.* deprecated - use:DeprecationWarning")
    def test_any_checkpoint(self, run, source, tmp_path):
        out = run("demo", "--model", source, "--prompt", "Hello", "--output", str(tmp_path / "o"))
        assert "14 tensors in FP8" in out
        assert "perplexity" in out
        assert "> Hello\n" in out
        assert (tmp_path / "o" / "weight-error.png").read_bytes().startswith(b"\x89PNG")

    def test_fp8_is_refused(self, capsys, fp8):
        assert cli.main(["demo", "--model", fp8]) == 1
        assert "the checkpoint is FP8 already" in capsys.readouterr().err


def test_debug_raises(source, tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        cli.main(["inspect", str(tmp_path / "missing"), "--debug"])


def test_an_interrupt_exits_with_130(monkeypatch, capsys, source):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(jq.checkpoint.inspect, "inspect", interrupt)
    assert cli.main(["inspect", source]) == 130
    assert capsys.readouterr().err == "jaxquant: interrupted\n"


def test_a_closed_pipe_is_no_error(source):
    code = f"import sys; from jaxquant import cli; sys.exit(cli.main(['inspect', {source!r}]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate()
    assert (process.returncode, err) == (0, b"")
