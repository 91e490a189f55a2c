"""Checkpoint folders: which files make one up, and what is refused."""

import json
import pickle
from pathlib import Path

import builders
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxquant.checkpoint.folder import CheckpointFolder
from jaxquant.errors import CheckpointError
from jaxquant.models.fused import FusedRows

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.arange(4, dtype=np.int8)
C = np.array(2.5, np.float16)


def write_index(folder: Path, weight_map: object) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def empty(tmp_path) -> Path:
    """A folder with a config and no weights."""
    (tmp_path / "config.json").write_text('{"model_type": "llama", "x": Infinity}')
    return tmp_path


@pytest.fixture
def single(empty) -> Path:
    save_file({"a": A, "b": B}, empty / "model.safetensors")
    return empty


@pytest.fixture
def sharded(empty) -> Path:
    save_file({"a": A, "c": C}, empty / "model-1.safetensors")
    save_file({"b": B}, empty / "model-2.safetensors")
    write_index(
        empty,
        {"c": "model-1.safetensors", "b": "model-2.safetensors", "a": "model-1.safetensors"},
    )
    return empty


def refusal(folder: Path) -> str:
    """The message with which a folder is refused, when opened or at the latest when listed."""
    with pytest.raises(CheckpointError) as caught:
        CheckpointFolder(folder).tensors  # noqa: B018
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    return message.removeprefix(f"{folder}")


def test_single_file(single):
    with CheckpointFolder(str(single)) as folder:
        assert folder.config == {"model_type": "llama", "x": float("inf")}
        assert folder.generation_config == {}
        assert folder.names == ("a", "b")
        assert folder.shards == (single / "model.safetensors",)
        assert folder.nbytes == A.nbytes + B.nbytes
        assert folder.info("b").dtype == np.int8
        assert folder.shard_of("b") == single / "model.safetensors"
        a = folder.read("a")
    np.testing.assert_array_equal(a, A)


def test_shards(sharded):
    (sharded / "generation_config.json").write_text('{"eos_token_id": 2}')
    folder = CheckpointFolder(sharded)
    assert folder.generation_config == {"eos_token_id": 2}
    assert folder.names == ("a", "b", "c")
    assert folder.shards == (sharded / "model-1.safetensors", sharded / "model-2.safetensors")
    assert folder.shard_of("b").name == "model-2.safetensors"
    assert set(folder.tensors) == {"a", "b", "c"}
    assert folder.tensors["c"].shape == ()
    assert folder.nbytes == A.nbytes + B.nbytes + C.nbytes
    for name, x in {"a": A, "b": B, "c": C}.items():
        np.testing.assert_array_equal(folder.read(name), x)
        assert folder.info(name) == folder.tensors[name]
    folder.close()
    np.testing.assert_array_equal(folder.read("a"), A)


def test_a_shard_is_opened_only_when_asked_for(sharded):
    (sharded / "model-2.safetensors").write_bytes(b"")
    folder = CheckpointFolder(sharded)
    assert folder.names == ("a", "b", "c")
    np.testing.assert_array_equal(folder.read("a"), A)
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors: truncated"):
        folder.info("b")


def test_a_lone_file_of_another_name_is_taken(empty):
    save_file({"a": A}, empty / "weights.safetensors")
    (empty / "._weights.safetensors").write_bytes(b"left by a file manager")
    np.testing.assert_array_equal(CheckpointFolder(empty).read("a"), A)


def test_several_files_without_an_index_are_refused(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    assert "2 safetensors files (model-1.safetensors, model-2.safetensors) and no model." in (
        refusal(sharded)
    )


def test_model_safetensors_comes_before_the_index(sharded):
    save_file({"z": B}, sharded / "model.safetensors")
    assert CheckpointFolder(sharded).names == ("z",)


def test_symbolic_links_are_followed(sharded, tmp_path_factory):
    snapshot = tmp_path_factory.mktemp("snapshot")
    for path in sharded.iterdir():
        (snapshot / path.name).symlink_to(path)
    np.testing.assert_array_equal(CheckpointFolder(snapshot).read("b"), B)


def test_shards_in_a_subfolder(empty):
    (empty / "weights").mkdir()
    save_file({"a": A}, empty / "weights" / "1.safetensors")
    write_index(empty, {"a": "weights/1.safetensors"})
    np.testing.assert_array_equal(CheckpointFolder(empty).read("a"), A)


def test_unknown_tensor(single):
    with pytest.raises(CheckpointError, match=r": no tensor 'z' among its 2"):
        CheckpointFolder(single).read("z")


# Refusals -----------------------------------------------------------------------------------------


def test_no_folder(tmp_path):
    assert refusal(tmp_path / "x") == ": no such folder; give the one that holds config.json"
    (tmp_path / "f").write_text("")
    assert refusal(tmp_path / "f") == ": not a folder; give the one that holds config.json"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "/config.json: no such file"),
        (b"{", "/config.json: not JSON: Expecting property name"),
        (b"\xff\xfe{", "/config.json: not JSON: "),
        (b"[1]", "/config.json: expected a JSON object, got [1]"),
        (b"[" * 200_000, "/config.json: not JSON: "),
    ],
)
def test_bad_config(single, content, message):
    (single / "config.json").unlink()
    if content is not None:
        (single / "config.json").write_bytes(content)
    assert refusal(single).startswith(message)


def test_bad_generation_config_is_told_when_asked_for(single):
    (single / "generation_config.json").write_text("[]")
    folder = CheckpointFolder(single)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: expected a JSON object"):
        folder.generation_config  # noqa: B018


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.pth", "x.ckpt"])
def test_pickles_are_refused_unopened(empty, name):
    (empty / name).write_bytes(pickle.dumps(Bomb()))
    assert refusal(empty) == (
        f": only pickle checkpoints ({name}), which can run code when loaded and are never "
        f"opened; convert them to safetensors"
    )


def test_gguf_and_nothing_at_all(empty):
    assert refusal(empty) == (
        ": no weights: expected model.safetensors or model.safetensors.index.json"
    )
    (empty / "model-Q4.gguf").write_bytes(b"GGUF")
    assert ": only GGUF files (model-Q4.gguf); give the safetensors checkpoint" in refusal(empty)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "weight_map must map tensor names to files, got None"),
        ({}, "weight_map must map tensor names to files, got {}"),
        (["a"], "weight_map must map tensor names to files, got ['a']"),
        ({"a": 1}, "tensor 'a': expected a file name, got 1"),
        ({"a": "../model-1.safetensors"}, "file '../model-1.safetensors' lies outside the folder"),
        ({"a": "x/../../m.safetensors"}, "file 'x/../../m.safetensors' lies outside the folder"),
        ({"a": "/m.safetensors"}, "file '/m.safetensors' lies outside the folder"),
        ({"a": "..\\m.safetensors"}, "lies outside the folder"),
        ({"a": "C:m.safetensors"}, "lies outside the folder"),
        ({"a": "pytorch_model.bin"}, "file 'pytorch_model.bin' is not a safetensors file"),
        ({"a": ""}, "file '' is not a safetensors file"),
    ],
)
def test_bad_index(empty, weight_map, message):
    write_index(empty, weight_map)
    refused = refusal(empty)
    assert refused.startswith("/model.safetensors.index.json: ")
    assert refused.endswith(message)


def test_index_that_is_no_object(empty):
    (empty / "model.safetensors.index.json").write_text('"x"')
    assert refusal(empty).endswith("index.json: expected a JSON object, got 'x'")


@pytest.mark.parametrize("name", ["gone", "nul\0", "\ud800", "x" * 300])
def test_missing_shard(sharded, name):
    file = f"{name}.safetensors"
    write_index(sharded, {"a": "model-1.safetensors", "y": file, "z": file})
    refused = refusal(sharded)
    assert refused.startswith(": shard '")
    assert ".safetensors' is missing, model.safetensors.index.json puts 2 tensors in it" in refused


def test_shard_that_is_a_dangling_link(sharded):
    (sharded / "model-2.safetensors").unlink()
    (sharded / "model-2.safetensors").symlink_to("gone")
    assert ": shard 'model-2.safetensors' is missing, " in refusal(sharded)


def test_tensor_listed_but_not_in_its_shard(sharded):
    save_file({"c": C}, sharded / "model-1.safetensors")
    assert refusal(sharded) == (
        "/model-1.safetensors: 1 of the 2 tensors that model.safetensors.index.json puts in it "
        "are not there, first 'a'; download the folder again"
    )


def test_tensor_in_a_shard_but_not_listed(sharded):
    save_file({"b": B, "b_scale": C}, sharded / "model-2.safetensors")
    assert refusal(sharded) == (
        "/model-2.safetensors: tensor 'b_scale' is not in model.safetensors.index.json; add it to "
        "weight_map or remove it from the shard"
    )


def test_tensor_in_two_shards(sharded):
    save_file({"b": B, "a": A + 1}, sharded / "model-2.safetensors")
    assert refusal(sharded) == (
        "/model-2.safetensors: tensor 'a' is also in model-1.safetensors, where "
        "model.safetensors.index.json puts it; remove one of the two"
    )


# Files to carry over ------------------------------------------------------------------------------


def test_other_files_are_the_small_ones_beside_the_weights(sharded):
    carried = [
        "LICENSE", "chat_template.jinja", "configuration_x.py", "generation_config.json",
        "merges.txt", "tokenizer.json", "tokenizer.model", "vocab.tiktoken",
    ]  # fmt: skip
    left = [
        "pytorch_model.bin", "optimizer.PT", "x.safetensors", "model.onnx", "q.gguf", "x.npz",
        ".gitattributes", "pytorch_model.bin.index.json",
    ]  # fmt: skip
    for name in carried + left:
        (sharded / name).write_text(name)
    (sharded / "original").mkdir()
    (sharded / "dangling").symlink_to("gone")
    (sharded / "state").write_bytes(pickle.dumps(Bomb()))
    (sharded / "state.zip").write_bytes(b"PK\3\4 as torch.save writes")
    with (sharded / "huge.txt").open("wb") as file:
        file.truncate(2**28)
    assert [path.name for path in CheckpointFolder(sharded).other_files()] == carried


@pytest.mark.parametrize("columns", [slice(None), slice(1, 3)], ids=str)
@pytest.mark.parametrize("given", [True, False])
def test_rows_of_a_projection_that_lie_in_several_groups(tmp_path, columns, given):
    x = np.arange(16 * 4, dtype=np.float32).reshape(16, 4)
    folder = builders.checkpoint(tmp_path / "fused", {"wqkv.weight": x})
    out = np.zeros(1000, np.uint8) if given else None
    with CheckpointFolder(folder) as opened:
        opened.split({"wqkv": FusedRows({"wq": 4, "wk": 2, "wv": 2}, groups=2)})
        got = opened.read_rows("wqkv.wk.weight", slice(1, 4), columns, out=out)
    np.testing.assert_array_equal(got, x[[5, 12, 13], columns])
    assert not given or np.shares_memory(got, out)
