"""A lowered kernel is read by other processes; no GPU is needed to lower one."""

import functools
import hashlib
import importlib
import json
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxquant.array import QuantizedArray
from jaxquant.matmul import RMSNorm, kernel_cache
from jaxquant.matmul.act_quant_sm90 import quantize, quantize_tokens
from jaxquant.matmul.kernel_cache import SUBFOLDER, kept
from jaxquant.matmul.tokens import QuantizedTokens

K = 1024


def lowered(kernel=quantize_tokens, *, prologue=None, rows=8) -> str:
    """What is lowered of a program with a kernel, for a GPU."""

    def program(x):
        layer = () if kernel is quantize_tokens else (jnp.zeros(1, jnp.int32),)
        return kept(kernel)(prologue, x, *layer, K, rows)

    x = jax.ShapeDtypeStruct((2, K), jnp.bfloat16)
    return jax.jit(program).trace(x).lower(lowering_platforms=("cuda",)).as_text()


def print_lowered(folder: str) -> None:
    """Prints how many kernels this process lowered, and a digest of the program."""
    jax.config.update("jax_compilation_cache_dir", folder)
    count = counted(setattr)
    text = lowered()
    print(json.dumps([len(count), hashlib.sha256(text.encode()).hexdigest()]))


def counted(setattr) -> list:
    """A list that grows with each kernel that is lowered."""
    module = importlib.import_module("jax._src.pallas.mosaic_gpu.lowering")
    lower, found = module.lower_jaxpr_to_module, []

    @functools.wraps(lower)
    def counting(*args, **kwargs):
        found.append(args)
        return lower(*args, **kwargs)

    setattr(module, "lower_jaxpr_to_module", counting)
    return found


def in_processes(folder: Path, n: int) -> list[list]:
    """What `print_lowered` prints in so many processes at once."""
    source = f"import sys; sys.path = {sys.path!r}; import {__name__} as m; m.print_lowered"
    command = [sys.executable, "-c", f"{source}({str(folder)!r})"]
    run = functools.partial(subprocess.run, command, capture_output=True, text=True)
    with ThreadPoolExecutor(n) as pool:
        processes = list(pool.map(lambda _: run(), range(n)))
    assert all(process.returncode == 0 for process in processes), processes
    return [json.loads(process.stdout) for process in processes]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    monkeypatch.setattr(kernel_cache, "_calls", {})
    yield tmp_path / SUBFOLDER
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


@pytest.fixture
def count(monkeypatch):
    return counted(monkeypatch.setattr)


@pytest.fixture
def another_process(folder):
    """As good as one: what this one read or wrote is forgotten."""

    def begin():
        jax.clear_caches()
        kernel_cache._calls.clear()

    return begin


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_a_second_process_lowers_no_kernel_and_has_the_same_program(tmp_path):
    [[n, program]] = in_processes(tmp_path, 1)
    assert n == 1
    assert in_processes(tmp_path, 1) == [[0, program]]
    assert len(files(tmp_path / SUBFOLDER)) == 1


def test_processes_at_once_leave_one_whole_file(tmp_path):
    found = in_processes(tmp_path, 3)
    [program] = {program for _, program in found}
    assert in_processes(tmp_path, 1) == [[0, program]]
    assert len(files(tmp_path / SUBFOLDER)) == 1


def test_a_kernel_is_in_a_program_and_lowered_once(folder, count):
    x = jax.ShapeDtypeStruct((2, K), jnp.bfloat16)
    run = functools.partial(kept(quantize_tokens), None, K=K, rows=8)
    text = jax.jit(lambda x: (run(x), run(x))).trace(x).lower(lowering_platforms=("cuda",))
    assert len(count) == 1
    assert text.as_text().count("@mosaic_gpu_v2") == 1


def test_results_are_no_more_committed_to_their_device_than_of_the_kernel_itself():
    # Else a program that is given its own results is traced again.
    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    exported = jax.export.export(jax.jit(lambda x: (x + 1, None)), platforms=["cpu"])(shape)
    call, traced = kernel_cache._call(bytes(exported.serialize())), []

    @jax.jit
    def run(x):
        traced.append(x)
        return call(x)

    x, none = run(jnp.zeros(2))
    assert none is None
    assert not x.committed
    assert run(x)[0].tolist() == [2, 2]
    assert len(traced) == 1


def test_what_tells_kernels_apart(folder, count, monkeypatch):
    norms = [RMSNorm(jnp.ones((1, K), jnp.bfloat16), eps) for eps in (1e-5, 1e-6)]
    lowered()
    lowered(rows=16)
    lowered(quantize)
    for norm in norms:
        lowered(quantize, prologue=norm)
    monkeypatch.setattr(jax, "__version__", "0.0.1")
    lowered()
    monkeypatch.setattr(kernel_cache, "_sources", lambda: "another source")
    lowered()
    assert len(count) == len(files(folder)) == 7


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"another file",
        lambda content: content[:-1],
        lambda content: content[:100] + bytes([content[100] ^ 1]) + content[101:],
    ],
    ids=["empty", "foreign", "cut short", "a bit"],
)
def test_a_damaged_file_is_made_anew(folder, count, another_process, caplog, damage):
    caplog.set_level(logging.DEBUG, logger="jaxquant")
    lowered()
    (file,) = files(folder)
    file.write_bytes(damage(file.read_bytes()))
    another_process()
    program = lowered()
    assert caplog.messages == [f"{file}: not a lowered kernel as it was written; made anew"]
    another_process()
    assert lowered() == program
    assert len(count) == 2


def test_a_file_under_the_name_of_another_is_made_anew(folder, count, another_process):
    lowered()
    (file,) = files(folder)
    other = lowered(rows=16)
    ({*files(folder)} - {file}).pop().replace(file)
    another_process()
    assert lowered() != other
    assert len(count) == 3


def test_where_nothing_can_be_written_each_process_lowers(folder, count, another_process, caplog):
    caplog.set_level(logging.DEBUG, logger="jaxquant")
    folder.write_text("no folder")
    lowered()
    another_process()
    lowered()
    assert len(count) == 2
    assert all("a lowered kernel could not be kept" in message for message in caplog.messages)
    assert len(caplog.messages) == 2


def test_a_write_that_fails_leaves_nothing(folder, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(kernel_cache.os, "replace", fail)
    lowered()
    assert not files(folder)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("jax_compilation_cache_dir", None),
        ("jax_compilation_cache_dir", "gs://bucket/folder"),
        ("jax_enable_compilation_cache", False),
    ],
)
def test_nothing_is_kept_where_jax_keeps_nothing_here(folder, count, option, value):
    before = getattr(jax.config, option)
    jax.config.update(option, value)
    try:
        lowered()
    finally:
        jax.config.update(option, before)
    assert len(count) == 1
    assert not folder.exists()


def test_nothing_is_kept_without_flatbuffers_and_the_log_says_so(folder, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="jaxquant")
    kernel_cache._log_once.cache_clear()
    monkeypatch.setattr(kernel_cache, "find_spec", lambda name: None)
    lowered()
    lowered(rows=16)
    assert caplog.messages == [
        "kernels are lowered by each process: jax.export needs the package flatbuffers"
    ]
    assert not folder.exists()


def test_the_interpreter_runs_kernels_as_they_are(folder):
    x = jnp.ones((2, K), jnp.bfloat16)
    with plgpu.force_gpu_interpret_mode():
        kept(quantize_tokens)(None, x, K, 8)
    assert not folder.exists()


@pytest.mark.parametrize(
    "value",
    [
        QuantizedTokens(jnp.zeros((8, 128)), jnp.zeros((1, 64)), (2, 3), jnp.dtype("bfloat16")),
        QuantizedArray(
            jnp.zeros((128, 128)),
            jnp.zeros((1, 1)),
            (128, 128),
            jnp.dtype("float32"),
            activation_scheme=None,
            transposed=True,
            in_dims=(2, 64),
        ),
    ],
    ids=["QuantizedTokens", "QuantizedArray"],
)
def test_what_kernels_give_survives_export(value):
    exported = jax.export.export(jax.jit(lambda a: jax.tree.map(lambda leaf: leaf + 1, a)))(value)
    read = jax.export.deserialize(exported.serialize())
    assert read.out_tree == jax.tree.structure(value)
    assert jax.tree.leaves(read.call(value))[0][0, 0] == 1
