"""Rows of several projections in one tensor: apart, together, and their names."""

import numpy as np
import pytest

from jaxquant.models.fused import FusedRows, rows_of, split_name, whole_name

WQKV = FusedRows({"wq": 6, "wk": 2, "wv": 2}, groups=3)
GATE_UP = FusedRows({"gate_proj": 5, "up_proj": 5})
FUSED = {"wqkv": WQKV, "gate_up_proj": GATE_UP}


@pytest.mark.parametrize("rows", [WQKV, GATE_UP])
@pytest.mark.parametrize("shape", [(), (4,)])
def test_parts_joined_are_the_whole(rows, shape):
    n = rows.groups * sum(rows.parts.values())
    whole = np.arange(n * 4).reshape(n, 4)[(slice(None), *[0] * (1 - len(shape)))]
    parts = [rows.take(whole, name) for name in rows.parts]
    assert [len(part) for part in parts] == [rows.groups * size for size in rows.parts.values()]
    assert np.array_equal(rows.join(parts), whole)


def test_a_part_has_its_rows_of_each_group_in_turn():
    assert WQKV.take(np.arange(30), "wk").tolist() == [6, 7, 16, 17, 26, 27]


def test_scales_are_taken_by_blocks():
    assert WQKV.take(np.arange(15), "wk", block=2).tolist() == [3, 8, 13]
    cut_short = FusedRows({"q": 8, "v": 6})
    assert cut_short.take(np.arange(4), "v", block=4).tolist() == [2, 3]


@pytest.mark.parametrize(
    ("rows", "block", "fits"),
    [
        (WQKV, 2, True),
        (WQKV, 4, False),
        (GATE_UP, 5, True),
        (GATE_UP, 10, False),
        (FusedRows({"q": 8, "v": 6}), 4, True),  # the last block may be short
        (FusedRows({"q": 8, "v": 6}, groups=2), 4, False),
    ],
)
def test_blocks_fit_that_hold_rows_of_one_projection(rows, block, fits):
    assert rows.fits(block) is fits


def test_names_of_parts_and_of_the_whole():
    name = "model.layers.0.attention.wqkv.wk.weight_scale_inv"
    whole = "model.layers.0.attention.wqkv.weight_scale_inv"
    assert split_name(name, FUSED) == (whole, "wk")
    assert whole_name(name, FUSED) == whole
    assert rows_of(whole, FUSED) is WQKV
    for other in ("model.norm.weight", "weight", "model.wqkv.w1.weight"):
        assert split_name(other, FUSED) is None
        assert whole_name(other, FUSED) == other
        assert rows_of(other, FUSED) is None
