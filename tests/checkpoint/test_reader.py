"""The safetensors reader against the `safetensors` package and against bad files.

`python tests/checkpoint/test_reader.py 100000` runs the mutation test that many times and counts
what was found.
"""

import copy
import json
import math
import os
import random
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from jaxquant.checkpoint.reader import DTYPE_NAMES, DTYPES, SafetensorsFile
from jaxquant.errors import CheckpointError


def file_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(dtype: Any = "F32", shape: Any = (2,), data_offsets: Any = (0, 8), **extra: Any) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets, **extra}


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    return path


# Reading ------------------------------------------------------------------------------------------


@pytest.fixture
def matrix(tmp_path):
    x = np.arange(6 * 10, dtype=np.float32).reshape(6, 10)
    header = {"x": entry("F32", x.shape, (0, x.nbytes)), "y": entry("F32", (2, 3, 10), (240, 480))}
    with SafetensorsFile(write(tmp_path, file_bytes(header, 2 * x.tobytes()))) as file:
        yield file, x


@pytest.mark.parametrize("columns", [slice(None), slice(0, 10), slice(3, 7), slice(9, 10)], ids=str)
def test_reads_columns_of_rows_and_no_other_bytes(matrix, monkeypatch, columns):
    file, x = matrix
    counts, preadv = [], os.preadv

    def count(*args):
        counts.append(preadv(*args))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", count)
    for name in ("x", "y"):
        got = file.read_rows(name, slice(1, 5), columns, flat=True)
        np.testing.assert_array_equal(got, x[1:5, columns])
        assert sum(counts) == got.nbytes
        counts.clear()


def test_reads_into_memory_that_is_given(matrix):
    file, x = matrix
    out = np.zeros(1000, np.uint8)
    for columns in (slice(None), slice(2, 4)):
        got = file.read_rows("x", slice(2, 4), columns, out=out)
        np.testing.assert_array_equal(got, x[2:4, columns])
        assert np.shares_memory(got, out)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_reads_every_dtype_bit_for_bit(tmp_path, dtype):
    bits = np.arange(24 * dtype.itemsize, dtype=np.uint8).clip(max=1 if dtype.kind == "b" else 255)
    n = bits.nbytes
    header = {"x": entry(DTYPE_NAMES[dtype], (2, 3, 4), (0, n)), "__metadata__": {"format": "pt"}}
    with SafetensorsFile(write(tmp_path, file_bytes(header, bits.tobytes()))) as file:
        x = file.read("x")
        info = file.tensors["x"]
    assert file.metadata == {"format": "pt"}
    assert (x.dtype, x.shape) == (info.dtype, info.shape) == (dtype, (2, 3, 4))
    assert x.tobytes() == bits.tobytes()
    assert info.nbytes == info.stop - info.start == n
    assert file.path.read_bytes()[info.start : info.stop] == bits.tobytes()


def test_read_is_a_read_only_view_that_outlives_close(tmp_path):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    file = SafetensorsFile(write(tmp_path, safetensors.numpy.save({"x": x})))
    first, second = file.read("x"), file.read("x")
    assert np.shares_memory(first, second)
    assert not first.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0] = 1
    file.close()
    file.close()
    np.testing.assert_array_equal(first, x)
    with pytest.raises(CheckpointError, match=r"tensor 'x': read after close"):
        file.read("x")


def test_unaligned_tensor_is_a_view_too(tmp_path):
    header = {"u": entry("U8", (1,), (0, 1)), "x": entry("F32", (2,), (1, 9))}
    x = np.array([1.5, -2.5], np.float32)
    file = SafetensorsFile(write(tmp_path, file_bytes(header, b"\7" + x.tobytes())))
    assert not file.read("x").flags.owndata
    np.testing.assert_array_equal(file.read("x"), x)


def test_empty_tensors_and_scalars(tmp_path):
    huge = [0, 2**29, 2**29]
    header = {"s": entry("F64", (), (0, 8)), "e": entry("F16", huge, (8, 8))}
    file = SafetensorsFile(write(tmp_path, file_bytes(header, np.float64(3).tobytes())))
    assert file.read("s").shape == ()
    assert file.read("s") == 3
    assert file.read("e").shape == (0, 2**29, 2**29)
    assert SafetensorsFile(write(tmp_path, file_bytes({}))).tensors == {}


def test_trailing_blanks_and_any_header_order_are_fine(tmp_path):
    header = {"b": entry(data_offsets=(8, 16)), "a": entry(data_offsets=(0, 8))}
    raw = json.dumps(header).encode() + b" \n\t "
    file = SafetensorsFile(write(tmp_path, file_bytes(raw, bytes(16))))
    assert list(file.tensors) == ["b", "a"]


@pytest.mark.parametrize(
    ("dtype", "nbytes"), [("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6)], ids=lambda x: str(x)
)
def test_packed_dtypes_are_listed_and_refused_when_read(tmp_path, dtype, nbytes):
    header = {"q": entry(dtype, (8,), (0, nbytes)), "x": entry(data_offsets=(nbytes, nbytes + 8))}
    file = SafetensorsFile(write(tmp_path, file_bytes(header, bytes(nbytes + 8))))
    assert file.tensors["q"].nbytes == nbytes
    assert file.read("x").tolist() == [0, 0]
    with pytest.raises(
        CheckpointError, match=r"tensor 'q': packed dtype float[46]_e\dm\dfn? cannot"
    ):
        file.read("q")


def test_unknown_name(tmp_path):
    file = SafetensorsFile(write(tmp_path, file_bytes({"x": entry()}, bytes(8))))
    with pytest.raises(CheckpointError, match=r"a\.safetensors: no tensor 'y' among its 1"):
        file.read("y")


# Refusals -----------------------------------------------------------------------------------------


def refusal(content: bytes, tmp_path: Path) -> str:
    path = write(tmp_path, content)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 1000
    return message.removeprefix(f"{path}: ")


def raw(text: str) -> bytes:
    return file_bytes(text.encode("utf-8"), bytes(8))


BAD_FILES = {
    "empty": (b"", "truncated: the file is empty"),
    "short": (b"\1\0\0", "truncated: expected at least 8 bytes, the file has 3"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid ", "a git-lfs pointer"),
    "pickle": (b"\x80\x04\x95" + b"x" * 90, "header length .*, at most 100000000"),
    "no header": (file_bytes(b""), "does not begin with {"),
    "header cut": (file_bytes({}, length=99), "truncated: expected at least 107 .* file has 10"),
    "blank": (file_bytes(b"  {}"), "does not begin with {"),
    "bom": (file_bytes(b"\xef\xbb\xbf{}"), "does not begin with {"),
    "list": (file_bytes([]), "does not begin with {"),
    "utf-8": (file_bytes(b'{"\xff":1}'), "bad header: 'utf-8' codec can't decode"),
    "json": (raw('{"a":}'), "bad header: Expecting value"),
    "nul after": (raw("{}\0"), "bad header: Extra data"),
    "nan": (raw('{"a":NaN}'), "bad header: NaN is not JSON"),
    "infinity": (raw('{"a":-Infinity}'), "bad header: -Infinity is not JSON"),
    "deep": (raw('{"a":' + "[" * 200_000), "bad header: nested too deeply"),
    "digits": (raw('{"a":' + "1" * 5000 + "}"), "bad header: Exceeds the limit"),
    "twice": (raw('{"a":1,"\\u0061":2}'), "bad header: duplicate key 'a'"),
    "field twice": (raw('{"a":{"dtype":1,"dtype":1}}'), "duplicate key 'dtype'"),
    "surrogate": (raw('{"__metadata__":{"\\ud800":""}}'), r"'\\ud800' is not Unicode"),
    "metadata": (file_bytes({"__metadata__": {"a": 1}}), r"__metadata__ must map .* got {'a': 1}"),
    "null metadata": (file_bytes({"__metadata__": None}), "__metadata__ must map .* got None"),
    "number": (file_bytes({"a": 1}), "tensor 'a': expected an object .* got 1"),
    "missing": (file_bytes({"a": {"dtype": "F32"}}), "tensor 'a': expected an object"),
    "extra": (file_bytes({"a": entry(x=1)}, bytes(8)), "tensor 'a': expected an object"),
    "dtype": (file_bytes({"a": entry("F33")}, bytes(8)), "unknown dtype 'F33', expected .* BF16"),
    "dtype type": (file_bytes({"a": entry([])}, bytes(8)), r"unknown dtype \[\]"),
    "shape": (file_bytes({"a": entry(shape=2)}, bytes(8)), "shape must .* got 2"),
    "float": (file_bytes({"a": entry(shape=[2.0])}, bytes(8)), r"shape must .* got \[2\.0\]"),
    "bool": (file_bytes({"a": entry(shape=[True, 2])}, bytes(8)), r"got \[True, 2\]"),
    "negative": (file_bytes({"a": entry(shape=[-2, -1])}, bytes(8)), r"got \[-2, -1\]"),
    "minus zero": (raw('{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'), r"\[-0\.0\]"),
    "2**63": (file_bytes({"a": entry(shape=[0, 2**63])}), "shape must be"),
    "overflow": (file_bytes({"a": entry(shape=[2**31, 2**31, 2, 0])}), "is too large"),
    "dims": (file_bytes({"a": entry(shape=[1] * 65)}), "65 dimensions, at most 64"),
    "offsets": (
        file_bytes({"a": entry(data_offsets=[8])}, bytes(8)),
        r"data_offsets must .* \[8\]",
    ),
    "begin > end": (file_bytes({"a": entry(data_offsets=[8, 0])}, bytes(8)), "data_offsets must"),
    "size": (
        file_bytes({"a": entry(data_offsets=[0, 4])}, bytes(4)),
        r"tensor 'a': F32 of shape \[2\] takes 8 bytes, data_offsets \[0, 4\] hold 4 bytes",
    ),
    "half byte": (
        file_bytes({"a": entry("F4", [3], [0, 2])}, bytes(2)),
        "F4 .* takes 1 bytes and 4 bits, data_offsets",
    ),
    "hole": (file_bytes({"a": entry(data_offsets=[8, 16])}, bytes(16)), "'a': .* leaves a hole"),
    "overlap": (
        file_bytes({"a": entry(), "b": entry(data_offsets=[4, 12])}, bytes(12)),
        "tensor 'b': .* overlaps the one before it",
    ),
    "in the middle": (
        file_bytes({"a": entry(), "b": entry(shape=[0], data_offsets=[4, 4])}, bytes(8)),
        "tensor 'b': .* overlaps",
    ),
    "truncated": (
        file_bytes({"a": entry()}, bytes(7)),
        "truncated: expected 77 bytes, the file has 76",
    ),
    "too long": (
        file_bytes({"a": entry()}, bytes(9)),
        "1 bytes after the last tensor: expected 77 bytes, the file has 78",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_refused_in_one_clear_line(tmp_path, case):
    content, message = BAD_FILES[case]
    assert re.search(message, refusal(content, tmp_path))


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: no such file"):
        SafetensorsFile(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"a directory, not a safetensors file"):
        SafetensorsFile(tmp_path)
    with pytest.raises(CheckpointError, match=r"/dev/null: not a regular file"):
        SafetensorsFile("/dev/null")
    with pytest.raises(CheckpointError, match=r"cannot be read"):
        SafetensorsFile(tmp_path / ("x" * 300))


# Against the safetensors package ------------------------------------------------------------------

# Not every release writes these; the dtypes are tested bit for bit above.
SAVED_DTYPES = [d for n, d in DTYPES.items() if n not in {"C64", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}]


@st.composite
def arrays(draw) -> np.ndarray:
    dtype = draw(st.sampled_from(SAVED_DTYPES))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    n = math.prod(shape) * dtype.itemsize
    bits = np.frombuffer(draw(st.binary(min_size=n, max_size=n)), np.uint8)
    return (bits & 1 if dtype.kind == "b" else bits).view(dtype).reshape(shape)


@given(tensors=st.dictionaries(st.text(max_size=8), arrays(), max_size=5), metadata=st.booleans())
@settings(max_examples=100, deadline=None)
def test_reads_what_safetensors_writes(tmp_path_factory, tensors, metadata):
    tensors.pop("__metadata__", None)
    path = tmp_path_factory.getbasetemp() / "written.safetensors"
    texts = {"format": "np", "ü": "\n"} if metadata else None
    path.write_bytes(safetensors.numpy.save(tensors, texts))
    with SafetensorsFile(path) as file:
        assert file.metadata == (texts or {})
        assert file.tensors.keys() == tensors.keys()
        for name, x in tensors.items():
            read = file.read(name)
            assert (read.dtype, read.shape) == (x.dtype, x.shape)
            assert read.tobytes() == x.tobytes()


class Json(str):
    """Text that goes into the header as it is."""


class Pairs(list[tuple[Any, Any]]):
    """A JSON object, in which a key may come twice."""


# Bits per element; without FNUZ, which the lowest supported release does not know.
WIDTHS = {n: 8 * dtype.itemsize for n, dtype in DTYPES.items() if not n.endswith("FNUZ")}
WIDTHS |= {"F4": 4, "F6_E2M3": 6}
ODD_VALUES: list[Any] = [
    0, 1, 2, 3, 4, 8, 16, -1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**70, 0.0,
    1.0, 8.5, True, False, None, "", "8", "F32", [], [0], [[2]], [0, 8], {}, {"F32": None},
    Json("-0"), Json("01"), Json("1e1"), Json("1e999"), Json("NaN"), Json("Infinity"),
    Json("-Infinity"), Json("'x'"), Json("9" * 4400), Json('"\\ud800"'), Json('"\\ud83d\\ude00"'),
    Json('"\\u0000"'), Json('"\x01"'), Json("[" * 130 + "]" * 130), Json("[" * 20000 + "]" * 20000),
]  # fmt: skip


def dump(value: Any) -> str:
    if isinstance(value, Json):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{dump(k)}:{dump(v)}" for k, v in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dump, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def valid_header(rng: random.Random) -> tuple[Pairs, int]:
    """Return a valid header and how many bytes of data it describes."""
    header = Pairs()
    offset = 0
    for i in range(rng.choice([0, 1, 1, 2, 2, 3, 4])):
        dtype = rng.choice(list(WIDTHS))
        shape = [rng.choice([0, 1, 2, 2, 3, 4]) for _ in range(rng.randrange(4))]
        bits = math.prod(shape) * WIDTHS[dtype]
        if bits % 8:
            shape, bits = [*shape, 4], bits * 4
        end = offset + bits // 8
        fields = [("dtype", dtype), ("shape", shape), ("data_offsets", [offset, end])]
        header.append((f"t{i}", Pairs(fields)))
        offset = end
    if rng.random() < 0.3:
        header.append(("__metadata__", Pairs([("format", "pt"), ("k", "v")])))
    rng.shuffle(header)
    return header, offset


def odd_value(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(ODD_VALUES))


def mutate_number(rng: random.Random, numbers: list[Any]) -> None:
    if not numbers or rng.random() < 0.1:
        numbers.insert(rng.randint(0, len(numbers)), odd_value(rng))
        return
    i = rng.randrange(len(numbers))
    match rng.randrange(5):
        case 0:
            numbers[i] = odd_value(rng)
        case 1:
            del numbers[i]
        case 2:
            numbers.append(rng.choice([1, numbers[i]]))
        case 3:
            rng.shuffle(numbers)
        case _ if type(numbers[i]) is int:
            numbers[i] += rng.choice([-8, -4, -1, 1, 4, 8])


def mutate_pairs(rng: random.Random, pairs: Pairs) -> None:
    i = rng.randrange(len(pairs)) if pairs else 0
    match rng.randrange(6) if pairs else 0:
        case 0:
            pairs.insert(i, (rng.choice(["x", "__metadata__", ""]), odd_value(rng)))
        case 1:
            pairs.insert(rng.randint(0, len(pairs)), copy.deepcopy(pairs[i]))
        case 2:
            del pairs[i]
        case 3:
            pairs[i] = (pairs[i][0], odd_value(rng))
        case 4:
            escaped = [Json('"\\u0074\\u0030"'), Json('"\\ud800"')]
            keys = ["Dtype", "shape", "dtype", "__metadata__", "\0", "é", *escaped]
            pairs[i] = (rng.choice(keys), pairs[i][1])
        case _:
            rng.shuffle(pairs)


def mutate_tensor(rng: random.Random, pairs: Pairs, total: int) -> None:
    """Mutate one tensor; most of these leave it well-formed and so reach later checks."""
    fields: dict[Any, Any] = dict(pairs)
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    whole = (
        len(pairs) == 3
        and fields.keys() == {"dtype", "shape", "data_offsets"}
        and isinstance(shape, list)
        and isinstance(offsets, list)
        and len(offsets) == 2
        and all(type(v) is int for v in offsets)
    )
    if not whole or rng.random() < 0.1:
        mutate_pairs(rng, pairs)
        return
    match rng.randrange(8):
        case 0:
            mutate_number(rng, shape)
        case 1:
            mutate_number(rng, offsets)
        case 2:
            fields["dtype"] = rng.choice([*WIDTHS, "F33", "f32", "F8", "I4"])
        case 3:  # elsewhere: a hole or an overlap
            by = rng.choice([-8, -4, -2, -1, 1, 2, 4, 8])
            offsets[:] = [max(0, v + by) for v in offsets]
        case 4:  # an empty tensor, anywhere
            shape.insert(0, 0)
            offsets[:] = [rng.randint(0, total + 1)] * 2
        case 5:  # overflow, zero or not
            shape[:] = [2**32, 2**31, rng.choice([0, 1, 2, 4])]
            rng.shuffle(shape)
        case 6:  # the same bytes under another shape
            shape.insert(rng.randint(0, len(shape)), 1)
        case _:
            same = [n for n in WIDTHS if WIDTHS[n] == WIDTHS.get(str(fields["dtype"]))]
            fields["dtype"] = rng.choice(same or ["F32"])
    pairs[:] = fields.items()


def mutate_bytes(rng: random.Random, content: bytes, header_stop: int) -> bytes:
    i = rng.randrange(8, header_stop) if header_stop > 8 else 0
    match rng.randrange(7):
        case 0:
            return content[:i] + bytes([rng.randrange(256)]) + content[i + 1 :]
        case 1:
            return (
                content[:i] + rng.choice(b'{}[]",:0123456789-. \n\\').to_bytes() + content[i + 1 :]
            )
        case 2:
            return content[:i] + rng.choice([b"\xff", b"\xed\xa0\x80", b"\0", b" "]) + content[i:]
        case 3:
            n = len(content)
            return content[: rng.choice([0, rng.randrange(8), rng.randrange(n + 1), n - 1, n - 2])]
        case 4:
            return content + bytes(rng.choice([1, 4, 8]))
        case 5:
            length = int.from_bytes(content[:8], "little") + rng.choice(
                [-8, -1, 1, 8, 2**27, 2**56]
            )
            return max(0, length).to_bytes(8, "little") + content[8:]
        case _:
            return content[:i] + content[i + 1 :]


def mutated_file(rng: random.Random) -> bytes:
    header, total = valid_header(rng)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        entries = [value for _, value in header if isinstance(value, Pairs)]
        if entries and rng.random() < 0.8:
            mutate_tensor(rng, rng.choice(entries), total)
        else:
            mutate_pairs(rng, header)
    text = dump(header)
    # What spoils the file as a whole is rare: it would hide the rest.
    before = rng.choice([" ", "\ufeff"]) if rng.random() < 0.02 else ""
    after = rng.choice(["\0", "x", "{}"]) if rng.random() < 0.02 else rng.choice(["", " ", "\n\t "])
    encoded = (before + text + after).encode()
    content = file_bytes(encoded, bytes(total))
    if rng.random() < 0.2:
        content = mutate_bytes(rng, content, 8 + len(encoded))
    return content


def check_no_laxer_than_safetensors(content: bytes, path: Path) -> str:
    """Hold the reader against the package on one file; return what became of it."""
    path.unlink(missing_ok=True)  # much faster than to overwrite
    path.write_bytes(content)
    try:
        theirs = dict(safetensors.deserialize(content))
        with safetensors.safe_open(path, framework="np") as opened:
            assert set(opened.keys()) == theirs.keys()
    except safetensors.SafetensorError:
        theirs = None
    try:
        file = SafetensorsFile(path)
    except CheckpointError as error:
        message = str(error).removeprefix(f"{path}: ")
        return ("stricter: " if theirs is not None else "refused: ") + message
    assert theirs is not None, f"accepted what safetensors refuses: {content!r}"
    assert file.tensors.keys() == theirs.keys()
    for name, info in file.tensors.items():
        assert list(info.shape) == theirs[name]["shape"]
        data = bytes(theirs[name]["data"])
        assert content[info.start : info.stop] == data
        if info.dtype in DTYPE_NAMES:
            assert DTYPE_NAMES[info.dtype] == theirs[name]["dtype"]
            assert file.read(name).tobytes() == data
    return "accepted"


@given(rng=st.randoms(use_true_random=False))
@settings(
    max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
def test_never_accepts_what_safetensors_refuses(tmp_path_factory, rng):
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    check_no_laxer_than_safetensors(mutated_file(rng), path)


KINDS = [
    "accepted", "truncated: the file is empty", "truncated: expected at least 8", "for the header",
    "does not begin with", "bad header: 'utf-8'", "bad header: Expecting", "bad header: Extra data",
    "bad header: duplicate key", "is not JSON", "nested too deeply", "Exceeds the limit",
    "__metadata__ must", "expected an object", "unknown dtype", "shape must be", "is too large",
    "data_offsets must be", "takes", "is not Unicode", "leaves a hole", "overlaps",
    "truncated: expected", "after the last tensor", "header length",
    "bad header",
]  # fmt: skip


def test_mutations_reach_every_check(tmp_path):
    rng = random.Random(0)
    path = tmp_path / "mutated.safetensors"
    outcomes = [check_no_laxer_than_safetensors(mutated_file(rng), path) for _ in range(3000)]
    unreached = [kind for kind in KINDS if not any(kind in outcome for outcome in outcomes)]
    assert not unreached


if __name__ == "__main__":
    rng = random.Random()
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(int(sys.argv[1])):
            outcome = check_no_laxer_than_safetensors(mutated_file(rng), Path(folder) / "m")
            kind = next(kind for kind in KINDS if kind in outcome)
            counts[outcome.partition(":")[0] + ": " + kind] += 1
    for kind, count in counts.most_common():
        print(f"{count:8} {kind}")
