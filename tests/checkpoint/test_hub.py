"""Finding a checkpoint: local folders, the hub's cache, and what the hub refuses. No network."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants, errors
from safetensors.numpy import save_file

from jaxquant.checkpoint.hub import resolve
from jaxquant.errors import CheckpointError, JaxquantError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL_FILES = ("config.json", "model-1.safetensors", "model-2.safetensors")


def fill(folder: Path) -> Path:
    """A checkpoint of two shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    weight_map = {}
    for name in MODEL_FILES[1:]:
        save_file({name: np.zeros(2, np.float32)}, folder / name)
        weight_map[name] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and no network behind it."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return cache


@pytest.fixture
def snapshot(cache) -> Path:
    """A complete snapshot of org/name in the cache."""
    repo = cache / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    return fill(repo / "snapshots" / COMMIT)


@pytest.fixture
def network(monkeypatch, tmp_path):
    """Stands for the hub: records its calls; does and returns what `answer` does and returns."""
    hub = SimpleNamespace(calls=[], answer=lambda: fill(tmp_path / "downloaded"))
    cached = huggingface_hub.snapshot_download

    def snapshot_download(hub_id, *, local_files_only, **options):
        if local_files_only:
            return cached(hub_id, local_files_only=True, **options)
        hub.calls.append((hub_id, options))
        return str(hub.answer())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return hub


def http_error(kind: Any, message: str = "404 Client Error.\n\nmore") -> Exception:
    return kind(message, response=SimpleNamespace(headers={}, request=None, status_code=404))


# Local --------------------------------------------------------------------------------------------


def test_a_local_folder_is_taken_as_it_is(tmp_path, monkeypatch, network):
    folder = fill(tmp_path / "org" / "name")
    assert resolve(folder) == folder
    assert resolve(str(folder)) == folder
    assert resolve("org/name") == Path("org/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/org/name") == folder
    assert network.calls == []


def test_importing_and_local_folders_do_without_huggingface_hub(tmp_path):
    code = (
        "import sys; from jaxquant.checkpoint import hub, reader, folder, writer;"
        f"hub.resolve({str(tmp_path)!r}); assert 'huggingface_hub' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_revision_of_a_local_folder_is_an_error(tmp_path):
    with pytest.raises(JaxquantError, match=r"revision 'v1' given for a local folder"):
        resolve(tmp_path, revision="v1")


@pytest.mark.parametrize(
    "name", ["./org/name", "../x", "/no/where", "~/no-such-folder", "org\\name", "a.safetensors"]
)
def test_a_path_that_is_not_there(name, network):
    with pytest.raises(CheckpointError, match=r": no such folder$"):
        resolve(name)
    assert network.calls == []


def test_a_path_object_is_never_a_hub_id(network):
    with pytest.raises(CheckpointError, match=r"^org/name: no such folder$"):
        resolve(Path("org/name"))
    assert network.calls == []


def test_a_file_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: a file; give the folder that"):
        resolve(str(file))


@pytest.mark.parametrize("name", ["", "gpt2", "a/b/c", "org/na me", "org/", "org/né", "a/b\n"])
def test_what_is_neither_a_folder_nor_a_hub_id(name, network):
    with pytest.raises(CheckpointError, match=r": neither an existing folder nor a hub id of the"):
        resolve(name)
    assert network.calls == []


@pytest.mark.parametrize("name", ["org/a--b", "org/a..b", "org/name.git", "-org/name"])
def test_what_the_hub_takes_for_no_id(name, network):
    with pytest.raises(CheckpointError, match=r"^'.*': not a hub id: [^\n]*$"):
        resolve(name)
    assert network.calls == []


# Cache --------------------------------------------------------------------------------------------


def test_a_complete_snapshot_needs_no_network(snapshot, network):
    assert resolve("org/name") == snapshot
    assert resolve("org/name", revision=COMMIT) == snapshot
    assert network.calls == []


def test_nothing_cached_is_downloaded(tmp_path, network):
    assert resolve("org/name", revision="v1") == tmp_path / "downloaded"
    ((hub_id, options),) = network.calls
    assert (hub_id, options["revision"]) == ("org/name", "v1")
    files = [
        "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json",
        "tokenizer.model", "tokenizer.json", "chat_template.jinja", "merges.txt", "LICENSE.md",
        "pytorch_model.bin", "model.gguf", "consolidated.safetensors", "original/x.safetensors",
        "training_args.bin", "picture.png", "onnx/model.onnx",
    ]  # fmt: skip
    patterns = {key: options[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(huggingface_hub.utils.filter_repo_objects(files, **patterns)) == files[:8]


@pytest.mark.parametrize("missing", MODEL_FILES)
def test_an_incomplete_snapshot_is_completed(snapshot, network, missing):
    content = (snapshot / missing).read_bytes()
    (snapshot / missing).unlink()

    def answer() -> Path:
        (snapshot / missing).write_bytes(content)
        return snapshot

    network.answer = answer
    assert resolve("org/name") == snapshot
    assert len(network.calls) == 1


def test_a_snapshot_of_links_without_their_blobs_is_incomplete(snapshot, network, tmp_path):
    (snapshot / "model-2.safetensors").unlink()
    (snapshot / "model-2.safetensors").symlink_to("../../blobs/gone")
    assert resolve("org/name") == tmp_path / "downloaded"


def test_an_incomplete_snapshot_without_a_network(snapshot):
    (snapshot / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"^org/name: .*(incomplete|not complete)[^\n]*$"):
        resolve("org/name")


def test_a_snapshot_that_lacks_a_license_will_do_without_a_network(snapshot, network):
    # What huggingface_hub 2 raises for it, and 1 does not know.
    incomplete: Any = type("IncompleteSnapshotError", (errors.LocalEntryNotFoundError,), {})
    error = incomplete("a file is missing")
    error.snapshot_path = str(snapshot)
    network.answer = raiser(error)
    (snapshot.parents[1] / "refs" / "main").unlink()
    assert resolve("org/name") == snapshot


def test_a_repository_without_safetensors(tmp_path, network):
    downloaded = tmp_path / "downloaded"
    downloaded.mkdir()
    (downloaded / "config.json").write_text("{}")
    network.answer = lambda: downloaded
    with pytest.raises(CheckpointError, match=r"^org/name: incomplete .*: no weights: expected"):
        resolve("org/name")


# Hub errors ---------------------------------------------------------------------------------------


def raiser(error: BaseException):
    def answer():
        raise error

    return answer


def test_no_network():
    with pytest.raises(CheckpointError, match=r"^org/name: not complete in the local cache and"):
        resolve("org/name")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error(errors.GatedRepoError), "gated on the hub: accept its terms at https://"),
        (http_error(errors.RepositoryNotFoundError), "no such folder here and no such repository"),
        (http_error(errors.RevisionNotFoundError), "no revision 'v1' on the hub"),
        (errors.LocalEntryNotFoundError("x\ny"), "not complete in the local cache and the hub"),
        (errors.OfflineModeIsEnabled("x"), "not complete in the local cache and the hub"),
        (http_error(errors.HfHubHTTPError, "502\nx"), "download failed: HfHubHTTPError: 502"),
        (OSError(28, "No space left on device"), "download failed: OSError: [Errno 28] No space"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_the_hub_are_told_in_one_line(network, error, message):
    network.answer = raiser(error)
    with pytest.raises(CheckpointError) as caught:
        resolve("org/name", revision="v1")
    assert str(caught.value).startswith(f"org/name: {message}")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_an_interrupt_is_not_swallowed(network):
    network.answer = raiser(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        resolve("org/name")
