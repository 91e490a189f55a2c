"""QuantReport: its sums, its table, its HTML, its JSON."""

import html.parser
import json

import pytest

from jaxquant.report import QuantReport, TensorReport, Timing, format_bytes


def quantized(path: str, error: float = 0.02, shape: tuple[int, ...] = (256, 128)) -> TensorReport:
    n = shape[0] * shape[1]
    return TensorReport(path, shape, True, "projection", 2 * n, n + 8, error)


def kept(path: str, reason: str = "1-D", shape: tuple[int, ...] = (256,)) -> TensorReport:
    return TensorReport(path, shape, False, reason, 2 * shape[0], 2 * shape[0])


REPORT = QuantReport(
    (
        quantized("model/layers/0/mlp/up_proj/weight", 0.021),
        quantized("model/layers/1/mlp/up_proj/weight", 0.034),
        quantized("model/layers/10/mlp/up_proj/weight", 0.027),
        kept("model/layers/0/norm/weight"),
        kept("model/layers/1/norm/weight"),
        kept("lm_head/weight", "<head> & tail"),
    )
)


def test_sums_and_parts():
    assert len(REPORT.quantized) == 3
    assert len(REPORT.kept) == 3
    assert {*REPORT.quantized, *REPORT.kept} == set(REPORT.tensors)
    assert REPORT.bytes_before == 3 * 2 * 256 * 128 + 3 * 512
    assert REPORT.bytes_after == 3 * (256 * 128 + 8) + 3 * 512


def test_summary_is_one_line():
    assert REPORT.summary() == "3 tensors in FP8, 3 kept; 198.1 kB -> 99.9 kB"


def test_table_has_one_row_for_all_layers_and_the_largest_error():
    lines = str(REPORT).splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == [
        "model/layers/*/mlp/up_proj/weight",
        "model/layers/*/norm/weight",
        "lm_head/weight",
    ]
    assert lines[2].split()[1:] == (
        ["3", "256x128", "fp8", "0.0340", "196.6", "kB", "->", "98.3", "kB", "projection"]
    )
    assert lines[3].split()[1:] == ["2", "256", "kept", "1.0", "kB", "1-D"]
    assert lines[-1] == REPORT.summary()
    assert len({lines[2].index("fp8"), lines[3].index("kept"), lines[4].index("kept")}) == 1


def test_only_whole_numbers_between_slashes_are_layers():
    report = QuantReport((quantized("conv1d/w2/weight"), quantized("conv2d/w3/weight")))
    assert "conv1d/w2/weight" in str(report)
    assert "conv2d/w3/weight" in str(report)


@pytest.mark.parametrize("change", ["shape", "reason", "quantized"])
def test_layers_that_differ_have_their_own_rows(change):
    other = {
        "shape": quantized("layers/1/weight", shape=(64, 64)),
        "reason": kept("layers/1/weight", "other"),
        "quantized": kept("layers/1/weight"),
    }[change]
    first = quantized("layers/0/weight") if change != "reason" else kept("layers/0/weight")
    assert str(QuantReport((first, other))).count("layers/*/weight") == 2


class Cells(html.parser.HTMLParser):
    """The text of each table cell; fails on a tag that is not closed."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag in ("td", "th", "caption"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.cells[-1] += data


def test_html_is_well_formed_escaped_and_says_what_the_table_says():
    parser = Cells()
    source = REPORT._repr_html_()
    parser.feed(source)
    assert not parser.open
    assert parser.cells[0] == REPORT.summary()
    assert "<head> & tail" in parser.cells
    assert "<head>" not in source
    text = str(REPORT)
    assert all(cell in text for cell in parser.cells)


def test_to_dict_is_plain_data():
    data = json.loads(json.dumps(REPORT.to_dict()))
    assert data["bytes_before"] == REPORT.bytes_before
    assert data["bytes_after"] == REPORT.bytes_after
    assert data["tensors"][1] == {
        "path": "model/layers/1/mlp/up_proj/weight",
        "shape": [256, 128],
        "quantized": True,
        "reason": "projection",
        "bytes_before": 65536,
        "bytes_after": 32776,
        "relative_error": 0.034,
    }
    assert data["tensors"][-1]["relative_error"] is None


def test_timing_is_printed_and_no_part_of_what_is_equal():
    timing = Timing(2.0, 3_000_000_000, {"read": 1.5, "quantize": 2.25}, 1_200_000_000)
    report = QuantReport(REPORT.tensors, timing)
    assert report == REPORT
    assert str(report).splitlines()[:-1] == str(REPORT).splitlines()
    assert str(report).splitlines()[-1] == (
        "read 3.0 GB in 2.0 s, 1.5 GB/s (by thread: read 1.5 s, quantize 2.2 s); peak 1.2 GB"
    )
    assert json.loads(json.dumps(report.to_dict()))["timing"] == {
        "seconds": 2.0,
        "nbytes": 3_000_000_000,
        "stages": {"read": 1.5, "quantize": 2.25},
        "peak_memory": 1_200_000_000,
    }
    assert "peak" not in str(Timing(0.0, 0, {}, None))


def test_an_empty_report_prints():
    report = QuantReport(())
    assert report.summary() == "0 tensors in FP8, 0 kept; 0 B -> 0 B"
    assert str(report).endswith(report.summary())
    assert report.summary().replace("->", "-&gt;") in report._repr_html_()


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (135_200_000, "135.2 MB"),
        (7_000_000_000, "7.0 GB"),
        (1.5e12, "1.5 TB"),
        (2.5e15, "2500.0 TB"),
        (-1500, "-1.5 kB"),
        (999_960, "1.0 MB"),
    ],
)
def test_format_bytes_is_decimal(n, text):
    assert format_bytes(n) == text
