"""The README does what it says: its snippets run, its commands run, its links lead somewhere."""

import argparse
import re
import shlex
from pathlib import Path

import builders
import pytest

from jaxquant import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for block in fenced("sh")
    for line in block.splitlines()
    if line.startswith("jaxquant ")
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory in which the README's names exist: its hub id is a folder, which goes first."""
    directory = tmp_path_factory.mktemp("readme")
    for folder in (directory / MODEL, directory / "cache" / "jaxquant" / MODEL.split("/")[1]):
        builders.checkpoint(
            folder,
            tokenizer=True,
            chat_template=builders.CHAT_TEMPLATE,
            num_hidden_layers=1,
            max_position_embeddings=2048,
        )
    (directory / "jaxquant").symlink_to(ROOT / "jaxquant", target_is_directory=True)
    return directory


@pytest.fixture(autouse=True)
def in_directory(directory, monkeypatch):
    monkeypatch.chdir(directory)
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory / "cache"))  # where the demo's model is


def test_python_snippets_run_in_order(capsys):
    namespace = {}
    for block in fenced("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert "1 kept" not in capsys.readouterr().out
    assert namespace["logits"].shape == (1, 4, builders.CONFIG["vocab_size"])
    assert namespace["y"].shape == (4, 2048)
    assert Path("SmolLM2-FP8/model.safetensors").exists()
    assert Path("mlp-fp8/model.safetensors").exists()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_run(command, capsys):
    assert cli.main(command) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.strip()


def test_every_command_is_shown():
    actions = cli._parser()._actions
    (choices,) = (a.choices for a in actions if isinstance(a, argparse._SubParsersAction))
    assert {command[0] for command in COMMANDS} == set(choices)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "jaxquant/checkpoint/README.md"])
def test_links_lead_somewhere(name):
    file = ROOT / name
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", file.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (file.parent / link).exists()] == []
