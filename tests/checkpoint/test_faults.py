"""Whatever goes wrong while files are read and written: one clear error, nothing that looks done.

Exports are killed at random moments, three by default; JAXQUANT_TEST_KILLS says how many.
"""

import dataclasses
import errno
import hashlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import builders
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.checkpoint import atomic, reader, stream, writer
from jaxquant.errors import CheckpointError

CONFIG = jq.QuantConfig(weight_block_size=builders.BLOCKS)
ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("JAXQUANT_TEST_KILLS", "3"))
SHARD_BYTES = 20_000


@pytest.fixture
def source(tmp_path):
    return builders.checkpoint(tmp_path / "in" / "bf16", shards=2, tokenizer=True)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out" / "fp8"


def export(source, out, **options):
    return jq.quantize_checkpoint(source, out, CONFIG, max_shard_bytes=SHARD_BYTES, **options)


def partial(out):
    return out.with_name(f".{out.name}.jaxquant-partial")


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def fail_after(monkeypatch):
    """fail_after(module, name, calls, error): later calls of a function raise the error."""

    def fail_after(module, name, calls, error):
        function, count = getattr(module, name), 0

        def failing(*args):
            nonlocal count
            count += 1
            if count > calls:
                raise error
            return function(*args)

        monkeypatch.setattr(module, name, failing)

    return fail_after


# Killed -------------------------------------------------------------------------------------------

# Dies at the n-th event: a file opened, made, renamed or removed, a write half done, a sync.
KILLED = """
    import os, signal, sys
    import jaxquant as jq
    from jaxquant.checkpoint import writer

    source, out, block, shard_bytes, moment = sys.argv[1:]
    left = int(moment)

    def event():
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(name, args):
        if name in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
            if isinstance(args[0], str | os.PathLike) and os.path.dirname(out) in str(args[0]):
                event()

    def write_at(file, offset, data, write=writer.write_at):
        data = memoryview(data)
        write(file, offset, data[: len(data) // 2])
        event()
        write(file, offset + len(data) // 2, data[len(data) // 2 :])

    def fsync(descriptor, fsync=os.fsync):
        event()
        fsync(descriptor)
        event()

    writer.write_at, os.fsync = write_at, fsync
    config = jq.QuantConfig(weight_block_size=int(block))
    sys.addaudithook(audit)
    jq.quantize_checkpoint(source, out, config, max_shard_bytes=int(shard_bytes), resume=True)
    print(-left)
"""


def run_killed(source, out, moment):
    argv = [source, out, builders.BLOCK, SHARD_BYTES, moment]
    command = [sys.executable, "-c", textwrap.dedent(KILLED), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_an_export_killed_at_random_moments_resumes_to_the_same_bytes(tmp_path, source, out):
    export(source, tmp_path / "whole")
    expected = hashes(tmp_path / "whole")
    done = run_killed(source, tmp_path / "counted" / "fp8", 10**9)
    assert done.returncode == 0, done.stderr
    events = int(done.stdout) + 10**9
    assert events > 60
    rng = random.Random()
    seed = rng.randrange(2**32)
    rng.seed(seed)
    kills = 0
    while kills < KILLS:
        moment = rng.randint(1, events)
        done = run_killed(source, out, moment)
        if done.returncode == 0:  # less was left to do than the moment is far
            assert hashes(out) == expected, (seed, moment)
            _remove(out)
            continue
        assert done.returncode == -signal.SIGKILL, done.stderr
        kills += 1
        if out.exists():  # killed after the last rename
            assert hashes(out) == expected, (seed, moment)
            _remove(out)
        elif (partial(out) / "config.json").exists():  # complete, but for its name
            assert hashes(partial(out)) == expected, (seed, moment)
        elif partial(out).exists():
            with pytest.raises(CheckpointError):
                jq.from_pretrained(partial(out))
    if not out.exists():
        export(source, out, resume=True)
    assert hashes(out) == expected, seed
    assert os.listdir(out.parent) == ["fp8"]


def test_a_complete_folder_that_is_cleared_is_no_checkpoint_from_the_first_moment(
    source, out, monkeypatch
):
    export(source, partial(out))  # as if killed ahead of the rename
    unlink, removed = Path.unlink, []

    def stopped(path, **kwargs):
        if removed:
            raise KeyboardInterrupt
        removed.append(path.name)
        unlink(path, **kwargs)

    monkeypatch.setattr(Path, "unlink", stopped)
    with pytest.raises(KeyboardInterrupt):
        export(source, out, resume=True)
    assert removed == ["config.json"]


def _remove(folder):
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


# Resumed ------------------------------------------------------------------------------------------


def interrupt(source, out, calls=12):
    with pytest.MonkeyPatch.context() as patch:
        count = 0

        def report(*args, report=stream.tensor_report):
            nonlocal count
            count += 1
            if count > calls:
                raise KeyboardInterrupt
            return report(*args)

        patch.setattr(stream, "tensor_report", report)
        with pytest.raises(KeyboardInterrupt):
            export(source, out, resume=True)


def finished_shards(out):
    return {path.name: path.stat().st_mtime_ns for path in partial(out).glob("*.safetensors")}


@pytest.mark.parametrize("calls", [8, 9, 10, 11, 12])
def test_finished_shards_are_kept_and_not_written_again(tmp_path, source, out, calls):
    report = export(source, tmp_path / "whole")
    interrupt(source, out, calls)
    kept = finished_shards(out)
    assert kept
    resumed = export(source, out, resume=True)
    assert hashes(out) == hashes(tmp_path / "whole")
    assert kept.items() <= {p.name: p.stat().st_mtime_ns for p in out.iterdir()}.items()
    # The report says what was there, and of the rest what it says of it in one run.
    earlier = [t for t in resumed.tensors if t.reason.endswith("; by an earlier run")]
    assert 0 < len(earlier) < len(report.tensors)
    assert resumed.tensors[len(earlier) :] == report.tensors[len(earlier) :]
    for t, whole in zip(earlier, report.tensors, strict=False):
        reason = f"{whole.reason}; by an earlier run"
        assert t == dataclasses.replace(whole, reason=reason, relative_error=None)
    assert os.listdir(out.parent) == ["fp8"]


def test_without_resume_an_export_starts_anew(source, out):
    interrupt(source, out)
    kept = finished_shards(out)
    report = export(source, out)
    assert len(report.tensors) == len(builders.tensors())
    assert not kept.items() & {p.name: p.stat().st_mtime_ns for p in out.iterdir()}.items()
    assert os.listdir(out.parent) == ["fp8"]


def test_a_shard_that_was_cut_short_is_written_again(tmp_path, source, out):
    export(source, tmp_path / "whole")
    interrupt(source, out)
    first = min(partial(out).glob("*.safetensors"))
    os.truncate(first, first.stat().st_size - 1)
    export(source, out, resume=True)
    assert hashes(out) == hashes(tmp_path / "whole")


@pytest.mark.parametrize("change", ["config", "shard size", "source"])
def test_another_export_is_not_resumed(source, out, change):
    interrupt(source, out)
    kept = finished_shards(out)
    config, shard_bytes = CONFIG, SHARD_BYTES
    if change == "config":
        config = jq.QuantConfig(weight_block_size=builders.BLOCK, scale_fmt="ue8m0")
    elif change == "shard size":
        shard_bytes += 1000
    else:
        os.utime(next(source.glob("*.safetensors")), (1, 1))
    with pytest.raises(CheckpointError, match=r"fp8: the unfinished run beside it was another one"):
        jq.quantize_checkpoint(source, out, config, max_shard_bytes=shard_bytes, resume=True)
    assert finished_shards(out) == kept  # it can still be


def test_resuming_nothing_is_an_export(source, out):
    export(source, out, resume=True)
    assert os.listdir(out.parent) == ["fp8"]
    assert jq.from_pretrained(out).quant_config is not None


def test_resuming_over_a_checkpoint_that_was_just_replaced_takes_nothing_of_it(
    tmp_path, source, out
):
    """After the swap the old folder has the hidden name, for as long as its removal takes."""
    weights = builders.tensors()
    other = builders.checkpoint(tmp_path / "other", {n: w * 2 for n, w in weights.items()})
    export(other, partial(out))
    export(source, out, resume=True)
    export(source, tmp_path / "whole")
    assert hashes(out) == hashes(tmp_path / "whole")


def test_two_at_once_are_refused(source, out):
    out.parent.mkdir()
    descriptor = atomic._lock(partial(out))
    try:
        with pytest.raises(CheckpointError, match="another process is writing here"):
            export(source, out)
    finally:
        os.close(descriptor)
    export(source, out)


# Disks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("what", ["write_at", "fsync"])
def test_a_full_disk(source, out, fail_after, monkeypatch, what, resume):
    error = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context():
        fail_after(*((writer, what) if what == "write_at" else (os, what)), 12, error)
        with pytest.raises(CheckpointError, match=r"^.*fp8: cannot be written: .*No space") as e:
            export(source, out, resume=resume)
    assert re.search(r"\d+ bytes are needed, \d+ are free on the disk", str(e.value))
    assert os.listdir(out.parent) == ([partial(out).name] if resume else [])
    monkeypatch.undo()
    export(source, out, resume=resume)
    assert os.listdir(out.parent) == ["fp8"]
    jq.from_pretrained(out)


@pytest.mark.parametrize("use", [export, lambda source, out: jq.from_pretrained(source, CONFIG)])
def test_a_disk_that_cannot_be_read(source, out, fail_after, use):
    fail_after(os, "preadv", 5, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(
        CheckpointError,
        match=r"^.*bf16/model-0000.-of-00002.safetensors: tensor '.*': cannot be read: .*Input/out",
    ):
        use(source, out)
    assert not out.parent.exists() or os.listdir(out.parent) == []


def test_short_reads_go_on(monkeypatch, source):
    expected = jq.from_pretrained(source, CONFIG)
    preadv = os.preadv

    def short(descriptor, buffers, offset):
        return preadv(descriptor, [buffers[0][:1000]], offset)

    monkeypatch.setattr(os, "preadv", short)
    tokens = np.arange(8, dtype=np.int32)[None]
    assert np.array_equal(jq.from_pretrained(source, CONFIG)(tokens), expected(tokens))


@pytest.mark.parametrize("change", ["truncated", "written to"])
@pytest.mark.parametrize("use", [export, lambda source, out: jq.from_pretrained(source, CONFIG)])
def test_a_file_that_changes_while_it_is_read(monkeypatch, source, out, change, use):
    shard = source / "model-00001-of-00002.safetensors"
    size, calls = shard.stat().st_size, itertools.count()
    read_into = reader.SafetensorsFile._read_into

    def change_at_fifth(*args):
        if next(calls) == 4:
            if change == "truncated":
                os.truncate(shard, size // 3)
            else:
                with shard.open("r+b") as file:
                    file.seek(size - 8)
                    file.write(bytes(8))
                os.utime(shard, (1, 1))  # as if time had passed
        return read_into(*args)

    monkeypatch.setattr(reader.SafetensorsFile, "_read_into", change_at_fifth)
    with pytest.raises(CheckpointError, match=rf"{shard.name}: changed while it was read \(it had"):
        use(source, out)
    assert not out.parent.exists() or os.listdir(out.parent) == []


def test_a_file_that_is_replaced_while_it_is_read_is_read_to_its_end(
    monkeypatch, tmp_path, source, out
):
    export(source, tmp_path / "whole")
    shard = source / "model-00001-of-00002.safetensors"
    read_into, calls = reader.SafetensorsFile._read_into, itertools.count()

    def replace(*args):
        if next(calls) == 0:
            (tmp_path / "garbage").write_bytes(bytes(1000))
            os.replace(tmp_path / "garbage", shard)
        return read_into(*args)

    monkeypatch.setattr(reader.SafetensorsFile, "_read_into", replace)
    export(source, out)
    assert hashes(out) == hashes(tmp_path / "whole")


def test_a_header_with_any_bit_flipped_is_refused(tmp_path):
    folder = builders.checkpoint(tmp_path / "w", tokenizer=True)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    stop = 8 + int.from_bytes(content[:8], "little")
    rng = random.Random(0)
    for _ in range(200):
        position, bit = rng.randrange(stop), rng.randrange(8)
        flipped = bytearray(content)
        flipped[position] ^= 1 << bit
        if _same_json(content[8:stop], bytes(flipped[8:stop])) and position >= 8:
            continue
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"^\S*/w"):
            jq.from_pretrained(folder, CONFIG)


def _same_json(a, b):
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


@pytest.mark.parametrize("keep", [0, 7, 100, 0.3, 0.99])
def test_a_truncated_shard_is_refused_before_work_begins(source, out, keep):
    shard = source / "model-00002-of-00002.safetensors"
    size = shard.stat().st_size
    os.truncate(shard, keep if isinstance(keep, int) else int(size * keep))
    for use in (lambda: export(source, out), lambda: jq.from_pretrained(source, CONFIG)):
        with pytest.raises(CheckpointError, match=rf"{shard.name}: truncated: "):
            use()
    assert not out.parent.exists()


# Interrupted --------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["load", "export"])
def test_an_interrupt_stops_within_a_second_and_frees_everything(source, out, what):
    script = """
        import gc, os, signal, sys, threading, time
        import jax
        import jaxquant as jq
        from jaxquant.checkpoint import stream

        source, out, block, what = sys.argv[1:]
        config = jq.QuantConfig(weight_block_size=int(block))
        jq.from_pretrained(source, config)  # compiles
        gc.collect()
        before = len(jax.live_arrays())
        reads = 0

        def slow_read(*args, read=stream._read):
            global reads
            reads += 1
            if reads == 8:
                print("go", flush=True)
            time.sleep(0.1)
            return read(*args)

        def interrupt(*_):
            global start
            start = time.perf_counter()
            raise KeyboardInterrupt

        stream._read = slow_read
        signal.signal(signal.SIGINT, interrupt)
        try:
            if what == "load":
                jq.from_pretrained(source, config)
            else:
                jq.quantize_checkpoint(source, out, config)
        except KeyboardInterrupt:
            seconds = time.perf_counter() - start
            names = [t.name for t in threading.enumerate() if t.name.startswith("jaxquant")]
        gc.collect()
        print(seconds, names, len(jax.live_arrays()) - before)
    """
    argv = [source, out, builders.BLOCK, what]
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, argv)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
        process.send_signal(signal.SIGINT)
        result, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    seconds, rest = result.split(maxsplit=1)
    assert float(seconds) < 1
    assert rest == "[] 0\n"
    assert not out.parent.exists() or os.listdir(out.parent) == []
