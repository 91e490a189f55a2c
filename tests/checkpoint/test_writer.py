"""Writing checkpoint folders: what is in them, and that nothing half-written is ever found."""

import errno
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings, strategies as st
from safetensors.numpy import load_file

from jaxquant.checkpoint import atomic
from jaxquant.checkpoint.folder import CheckpointFolder
from jaxquant.checkpoint.reader import DTYPES
from jaxquant.checkpoint.shard_files import TensorSource
from jaxquant.checkpoint.writer import write_folder
from jaxquant.errors import CheckpointError

CONFIG = {"model_type": "llama", "name": "ü"}


def source(name: str, x: np.ndarray) -> TensorSource:
    return TensorSource(name, x.dtype, x.shape, lambda: x)


def sources(count: int = 4, fill: int = 0) -> list[TensorSource]:
    """`count` tensors of 40 bytes, t0, t1, ..."""
    return [source(f"t{i}", np.full(10, fill + i, np.float32)) for i in range(count)]


def read_back(directory: Path) -> dict[str, np.ndarray]:
    folder = CheckpointFolder(directory)
    return {name: folder.read(name) for name in folder.names}


def assert_holds(directory: Path, fill: int = 0) -> None:
    """The folder is the finished one that `sources(fill=fill)` makes."""
    found = read_back(directory)
    assert list(found) == [s.name for s in sources()]
    for s in sources(fill=fill):
        np.testing.assert_array_equal(found[s.name], s.read())


def bits(dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Every byte pattern in turn, NaNs included."""
    n = int(np.prod(shape)) * dtype.itemsize
    flat = np.arange(n, dtype=np.uint8) & (1 if dtype.kind == "b" else 255)
    return flat.view(dtype).reshape(shape)


# What is written ----------------------------------------------------------------------------------


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    tensors = {name: bits(dtype, (3, 5)) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": np.array(7, np.int64), "empty": np.zeros((0, 4), np.float16)}
    path = write_folder(tmp_path / "out", [source(n, x) for n, x in tensors.items()], config=CONFIG)
    assert path == tmp_path / "out"
    found = read_back(path)
    assert found.keys() == tensors.keys()
    for name, x in tensors.items():
        assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape)
        assert found[name].tobytes() == x.tobytes()
        assert found[name].flags.aligned
    assert sorted(os.listdir(path)) == ["config.json", "model.safetensors"]
    assert json.loads((path / "config.json").read_text("utf-8")) == CONFIG


def test_safetensors_reads_it(tmp_path):
    kept = [name for name in DTYPES if not name.startswith("F8")]
    tensors = {name: bits(DTYPES[name], (2, 3)) for name in kept if name != "C64"}
    path = write_folder(tmp_path / "out", map(source, tensors, tensors.values()), config={})
    found = load_file(path / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, x in tensors.items():
        assert found[name].tobytes() == x.tobytes()
    with safetensors.safe_open(path / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}


@given(
    sizes=st.lists(st.integers(0, 50), min_size=1, max_size=12),
    limit=st.integers(1, 120),
    dtypes=st.lists(st.sampled_from(["U8", "F16", "F32", "F64", "F8_E4M3"]), min_size=12),
)
@settings(max_examples=30, deadline=None)
def test_shards_are_filled_in_order(tmp_path_factory, sizes, limit, dtypes):
    path = tmp_path_factory.mktemp("shards") / "out"
    tensors = {f"t{i:02}": bits(DTYPES[dtypes[i]], (size,)) for i, size in enumerate(sizes)}
    write_folder(path, map(source, tensors, tensors.values()), config={}, max_shard_bytes=limit)
    folder = CheckpointFolder(path)
    for name, x in tensors.items():
        assert folder.read(name).tobytes() == x.tobytes()
    count = len(folder.shards)
    if count == 1:
        assert [shard.name for shard in folder.shards] == ["model.safetensors"]
        assert not (path / "model.safetensors.index.json").exists()
    else:
        expected = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        assert [shard.name for shard in folder.shards] == expected
        index = json.loads((path / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {"total_size": sum(x.nbytes for x in tensors.values())}
        assert list(index["weight_map"]) == list(tensors)
    places = [folder.shard_of(name).name for name in tensors]
    assert places == sorted(places)
    for shard in folder.shards:
        held = [x.nbytes for name, x in tensors.items() if folder.shard_of(name) == shard]
        assert sum(held) <= limit or sum(size > 0 for size in held) == 1
        assert (int.from_bytes(shard.read_bytes()[:8], "little") + 8) % 8 == 0


def test_other_files_are_carried_over(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "blob").write_text("tokens")
    tokenizer = tmp_path / "in" / "tokenizer.json"
    tokenizer.symlink_to("../blob")  # as in the hub's cache
    path = write_folder(tmp_path / "out", sources(), config={}, files=[tokenizer])
    assert not (path / "tokenizer.json").is_symlink()
    assert (path / "tokenizer.json").read_text() == "tokens"
    tokenizer.chmod(0o640)
    path = write_folder(tmp_path / "again", sources(), config={}, files=[tokenizer])
    assert stat.S_IMODE((path / "tokenizer.json").stat().st_mode) == 0o640


def test_a_tensor_comes_in_pieces_or_whole(tmp_path):
    x = np.arange(30, dtype=np.float32).reshape(10, 3)
    y = np.arange(5, dtype=np.float32)
    tensors = [
        TensorSource("x", x.dtype, x.shape, lambda: iter([x[:4], x[4:5], x[5:5], x[5:]])),
        TensorSource("y", y.dtype, y.shape, lambda: (y[i : i + 2] for i in (0, 2, 4))),
    ]
    found = read_back(write_folder(tmp_path / "out", tensors, config={}))
    np.testing.assert_array_equal(found["x"], x)
    np.testing.assert_array_equal(found["y"], y)


@pytest.mark.parametrize("rows", [9, 11])
def test_pieces_that_are_not_the_tensor_are_refused(tmp_path, rows):
    def read():
        return (np.zeros((1, 3), np.float32) for _ in range(rows))

    announced = TensorSource("x", np.dtype(np.float32), (10, 3), read)
    message = rf"^tensor 'x': announced as float32 \[10, 3\], came as float32 \[{rows}, 3\]"
    refuse(tmp_path / "out", message, [*sources(), announced])


def test_tensors_are_made_one_at_a_time_and_in_order(tmp_path):
    order = []

    def make(i: int) -> np.ndarray:
        order.append(f"make {i}")
        # Dtypes of falling and rising width: the layout differs from the order.
        return np.zeros(2**20 // (1, 8, 2, 4)[i], f"u{(1, 8, 2, 4)[i]}")

    tensors = [
        TensorSource(str(i), np.dtype(f"u{width}"), (2**20 // width,), lambda i=i: make(i))
        for i, width in enumerate((1, 8, 2, 4))
    ]
    tracemalloc.start()
    write_folder(
        tmp_path / "out", tensors, config={}, on_tensor=lambda s: order.append(f"done {s.name}")
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert order == [f"{what} {i}" for i in range(4) for what in ("make", "done")]
    assert peak < 1.5 * 2**20


def test_strided_arrays_and_parents_that_do_not_exist(tmp_path):
    x = np.arange(12, dtype=np.float32).reshape(3, 4).T
    path = write_folder(tmp_path / "a" / "b", [source("x", x)], config={})
    np.testing.assert_array_equal(read_back(path)["x"], x)


# Refusals -----------------------------------------------------------------------------------------


def refuse(directory: Path, message: str, tensors: Any = None, **options: Any) -> None:
    """Writing is refused, in one line, and nothing is left of it."""
    before = sorted(directory.parent.iterdir())
    tensors = sources() if tensors is None else tensors
    options.setdefault("config", {})
    with pytest.raises(CheckpointError, match=message) as caught:
        write_folder(directory, tensors, **options)
    assert "\n" not in str(caught.value)
    assert sorted(directory.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([], "^no tensors to write"),
        ([*sources(1), *sources(1)], "^tensor 't0': two tensors of that name"),
        ([source("__metadata__", np.zeros(1))], "the name is reserved by the safetensors format"),
        (
            [source("x", np.zeros(1, "c16"))],
            "tensor 'x': dtype complex128 has no place .* bfloat16",
        ),
        ([source("x", np.zeros(1, ">f4"))], "tensor 'x': dtype >f4 has no place in safetensors"),
        ([source("\ud800", np.zeros(1))], r"bad header: '\\ud800' is not Unicode"),
    ],
)
def test_tensors_that_cannot_be_written(tmp_path, tensors, message):
    refuse(tmp_path / "out", message, tensors)


@pytest.mark.parametrize(
    "made", [np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float16), np.zeros(6, np.float32)]
)
def test_a_tensor_other_than_announced(tmp_path, made):
    announced = TensorSource("x", np.dtype(np.float32), (3, 2), lambda: made)
    refuse(
        tmp_path / "out",
        rf"^tensor 'x': announced as float32 \[3, 2\], came as {made.dtype} \[",
        [*sources(), announced],
    )


def test_bad_options(tmp_path):
    out = tmp_path / "out"
    refuse(out, "max_shard_bytes must be positive, got 0", max_shard_bytes=0)
    refuse(out, r"out/config\.json: not JSON: .*int64", config={"x": np.int64(1)})
    refuse(out, r"config\.json: another file of the folder", files=[tmp_path / "config.json"])
    refuse(out, r"model\.safetensors: another file", files=[tmp_path / "model.safetensors"])
    refuse(out, r"cannot be written: .*No such file.*gone", files=[tmp_path / "gone"])


def test_destination_that_is_taken(tmp_path):
    out = tmp_path / "out"
    out.write_text("x")
    refuse(out, "out: a file of that name is in the way", overwrite=True)
    out.unlink()
    out.mkdir()
    write_folder(out, sources(), config={})  # an empty folder is as good as none
    refuse(out, "out: not empty; choose another folder, or replace it with overwrite=True")
    assert_holds(out)


def test_a_folder_that_is_no_checkpoint_is_never_overwritten(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").write_text("x")
    refuse(tmp_path / "thesis", r"not empty and no checkpoint \(no config\.json\)", overwrite=True)
    assert (tmp_path / "thesis" / "chapter1").exists()


def test_a_destination_that_appears_meanwhile_is_left_alone(tmp_path):
    out = tmp_path / "out"

    def appear(_: TensorSource) -> None:
        out.mkdir(exist_ok=True)
        (out / "config.json").write_text("theirs")

    with pytest.raises(CheckpointError, match="not empty; choose another folder"):
        write_folder(out, sources(), config={}, on_tensor=appear)
    assert os.listdir(tmp_path) == ["out"]
    assert (out / "config.json").read_text() == "theirs"


def test_a_disk_that_is_too_small_is_told_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    refuse(tmp_path / "out", r"out: needs \d{3} bytes, 100 are free on its disk")


# Overwriting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("swaps", [True, False])
def test_overwriting_replaces_the_whole_folder(tmp_path, monkeypatch, swaps):
    if not swaps:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    out = tmp_path / "out"
    write_folder(out, sources(fill=9), config={}, max_shard_bytes=80)
    # The tensors come out of the folder that is replaced.
    old = CheckpointFolder(out)
    tensors = [
        TensorSource(n, old.info(n).dtype, old.info(n).shape, lambda n=n: old.read(n) - 9)
        for n in old.names
    ]
    write_folder(out, tensors, config=CONFIG, overwrite=True)
    assert_holds(out)
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors"]
    assert os.listdir(tmp_path) == ["out"]


def test_the_system_swaps_folders_in_one_step(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if sys.platform == "linux":
        assert atomic._exchange(tmp_path / "a", tmp_path / "b")
        assert os.listdir(tmp_path / "a") == ["b"]
    assert not atomic._exchange(tmp_path / "a", tmp_path / "c")


def test_a_swap_that_fails_half_way_is_undone(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write_folder(out, sources(), config={})
    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    rename = os.rename

    def failing(a: Path, b: Path) -> None:
        if b == out and "replaced" not in a.name:
            raise OSError(errno.EIO, "Input/output error")
        rename(a, b)

    monkeypatch.setattr(os, "rename", failing)
    refuse(out, "out: cannot be written: .*Input/output", sources(fill=9), overwrite=True)
    assert_holds(out)


# Failures in the middle ---------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EPIPE, "x"), MemoryError()])
@pytest.mark.parametrize("where", ["read", "on_tensor"])
def test_errors_of_the_caller_pass_through_and_leave_nothing(tmp_path, error, where):
    def fail(*_: object) -> None:
        raise error

    tensors = sources()
    options: dict[str, Any] = {"on_tensor": fail} if where == "on_tensor" else {}
    if where == "read":
        tensors.append(TensorSource("x", np.dtype(np.int8), (), fail))
    with pytest.raises(type(error)) as caught:
        write_folder(tmp_path / "out", tensors, config={}, **options)
    assert caught.value is error
    assert os.listdir(tmp_path) == []


def test_what_does_not_read_back_is_not_kept(tmp_path):
    def spoil(s: TensorSource) -> None:
        (partial,) = tmp_path.iterdir()
        with (partial / "model.safetensors.unfinished").open("r+b") as file:
            content = file.read().replace(b'"F32"', b'"I32"')
            file.seek(0)
            file.write(content)

    with pytest.raises(CheckpointError, match=r"model\.safetensors: does not read back as it was"):
        write_folder(tmp_path / "out", sources(), config={}, on_tensor=spoil)
    assert os.listdir(tmp_path) == []


def run(code: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run code that has `out`, `sources`, `die` and the writer at hand."""
    prelude = f"""
        import os, resource, signal, sys
        from pathlib import Path
        import numpy as np
        from jaxquant.checkpoint import writer
        from jaxquant.checkpoint.shard_files import TensorSource
        from jaxquant.checkpoint.writer import write_folder

        out = Path({str(directory)!r})

        def die(*_, **__):
            os.kill(os.getpid(), signal.SIGKILL)

        def sources(n=10, count=4):
            return [
                TensorSource(f"t{{i}}", np.dtype(np.float32), (n,),
                             lambda i=i: np.full(n, i, np.float32))
                for i in range(count)
            ]
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(code)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )


WRITE = "write_folder(out, sources(), config={}, max_shard_bytes=80, overwrite=True"
KILLS = {
    "second tensor": f"""
        s = sources()
        s[1] = TensorSource("t1", s[1].dtype, s[1].shape, die)
        {WRITE.replace("sources()", "s")})
    """,
    "second shard": f"{WRITE}, on_tensor=lambda s: s.name == 't2' and die())",
    "after the shards": f"writer._verify = die; {WRITE})",
    "index written, no config.json": f"""
        durable = writer.durable
        writer.durable = lambda path: die() if path.name == "config.json" else durable(path)
        {WRITE})
    """,
}


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("moment", KILLS)
def test_a_kill_leaves_the_destination_as_it_was(tmp_path, moment, existing):
    out = tmp_path / "out"
    if existing:
        write_folder(out, sources(fill=9), config={})
    result = run(KILLS[moment], out)
    assert result.returncode == -signal.SIGKILL, result.stderr
    (partial,) = (path for path in tmp_path.iterdir() if path != out)
    assert partial.name == ".out.jaxquant-partial"
    assert not (partial / "config.json").exists()
    with pytest.raises(CheckpointError):
        CheckpointFolder(partial).tensors  # noqa: B018
    assert out.exists() == existing
    if existing:
        assert_holds(out, fill=9)
    write_folder(out, sources(), config={}, overwrite=True)  # what is left is in nobody's way
    assert_holds(out)


def test_a_kill_after_the_swap_leaves_the_new_folder(tmp_path):
    out = tmp_path / "out"
    write_folder(out, sources(fill=9), config={})
    result = run(f"writer.shutil.rmtree = die; {WRITE})", out)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert_holds(out)


def test_a_full_disk(tmp_path):
    # A limit on the size of files stands for the disk's; Python ignores SIGXFSZ by itself.
    code = """
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            write_folder(out, sources(n=100_000), config={})
        except writer.CheckpointError as error:
            sys.exit(str(error))
    """
    result = run(code, tmp_path / "out")
    assert result.returncode == 1
    assert result.stderr.startswith(f"{tmp_path}/out: cannot be written: [Errno 27] File too large")
    needed, free = map(int, re.findall(r" (\d+) (?:bytes|are)", result.stderr))
    assert 1_600_000 < needed < 1_601_000
    assert free > 0
    assert os.listdir(tmp_path) == []
