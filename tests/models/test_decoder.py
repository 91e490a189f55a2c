"""How layers that differ in what they compute are scanned."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from jaxquant.models.decoder import repeats


@given(st.lists(st.sampled_from("abc"), max_size=24).map(tuple))
def test_pieces_repeated_are_the_whole(kinds):
    pieces = repeats(kinds)
    rebuilt = [kinds[start : start + period] * count for start, period, count in pieces]
    assert sum(rebuilt, ()) == kinds
    assert sum(period for _, period, _ in pieces) <= len(kinds)


@pytest.mark.parametrize(
    ("kinds", "pieces"),
    [
        ("", ()),
        ("a" * 32, ((0, 1, 32),)),
        ("ab" * 13, ((0, 2, 13),)),  # Gemma 2
        ("aaaaab" * 4 + "aa", ((0, 6, 4), (24, 1, 2))),  # Gemma 3
        ("aaab" * 9, ((0, 4, 9),)),  # SmolLM3
        ("a" * 28 + "b" * 4, ((0, 1, 28), (28, 1, 4))),  # Qwen2 with windows
    ],
)
def test_patterns_of_models(kinds, pieces):
    assert repeats(tuple(kinds)) == pieces
