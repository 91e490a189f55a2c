"""The README does what it says: its snippets run, its commands run, its links lead somewhere."""

import argparse
import re
import shlex
from pathlib import Path

import builders
import pytest

from jaxquant import cli
from jaxquant.models.registry import ARCHITECTURES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = [
    str(path.relative_to(ROOT))
    for path in sorted(ROOT.glob("jaxquant/*/README.md"))
    if len(list(path.parent.glob("*.py"))) > 1
]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in fenced("sh") for line in block.splitlines()]
    return [shlex.split(x, comments=True)[1:] for x in lines if x.startswith("jaxquant ")]


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A directory in which the README's names exist: its hub id is a folder, which goes first."""
    model = builders.checkpoint(
        tmp_path / MODEL,
        tokenizer=True,
        chat_template=builders.CHAT_TEMPLATE,
        num_hidden_layers=1,
        max_position_embeddings=2048,
    )
    demo_model = tmp_path / "cache" / "jaxquant" / model.name
    demo_model.parent.mkdir(parents=True)
    demo_model.symlink_to(model)
    (tmp_path / "jaxquant").symlink_to(ROOT / "jaxquant")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_snippets_run_in_order(directory):
    namespace = {}
    for block in fenced("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["logits"].shape == (1, 4, builders.CONFIG["vocab_size"])
    assert namespace["y"].shape == (4, 2048)
    assert (directory / "SmolLM2-FP8" / "model.safetensors").exists()
    assert (directory / "mlp-fp8" / "model.safetensors").exists()


def test_commands_run_in_order(directory, capsys):
    for command in commands():
        assert cli.main(command) == 0, (command, capsys.readouterr().err)
        assert capsys.readouterr().out.strip(), command
    assert (directory / "SmolLM2-FP8" / "model.safetensors").exists()


def test_every_command_is_shown():
    actions = cli._parser()._actions
    (choices,) = (a.choices for a in actions if isinstance(a, argparse._SubParsersAction))
    assert {command[0] for command in commands()} == set(choices)


def test_every_family_is_listed():
    table = README.split("### Families")[1].split("\n## ")[0]
    assert set(re.findall(r"`(\w+ForCausalLM)`", table)) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", *FOLDERS])
def test_links_lead_somewhere(name):
    file = ROOT / name
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", file.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (file.parent / link).exists()] == []


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_says_what_each_module_is_for(name):
    file = ROOT / name
    modules = {path.name for path in file.parent.glob("*.py")} - {"__init__.py"}
    linked = re.findall(r"\]\((\w+\.py)\)", file.read_text(encoding="utf-8"))
    assert sorted(linked) == sorted(modules)
