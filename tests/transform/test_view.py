"""A view has the values of the array that went through the same steps."""

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from fp8_checks import kernel
from hypothesis import strategies as st

from jaxquant.transform import view as views
from jaxquant.transform.view import IN, OUT, STACK, Factor


def test_a_whole_array_has_one_factor_a_dimension():
    view = views.view_of(kernel(3, 2, 32, 48), 0)
    assert view.dims == (
        (Factor(STACK, 3, 2),),
        (Factor(STACK, 2, 1),),
        (Factor(IN, 32, 1),),
        (Factor(OUT, 48, 1),),
    )
    assert view.shape == (3, 2, 32, 48)
    assert views.is_whole(view, view.stored)


def test_reshape_splits_and_joins_again():
    view = views.view_of(kernel(32, 48), 0)
    split = views.reshape(view, (32, 1, 6, 8))
    assert split is not None
    assert split.dims[1:] == ((), (Factor(OUT, 6, 8),), (Factor(OUT, 8, 1),))
    assert not views.is_whole(split, view.stored)
    joined = views.reshape(split, (32, 48))
    assert joined is not None
    assert views.is_whole(joined, view.stored)


@pytest.mark.parametrize("shape", [(6, 256), (7, 5, 0), (24, 64)])
def test_a_reshape_that_cuts_factors_apart_gives_none(shape):
    assert views.reshape(views.view_of(kernel(32, 48), 0), shape) is None


def test_only_floating_dtypes_of_16_bits_and_more_are_left_to_the_product():
    view = views.view_of(kernel(32, 48), 0)
    assert views.astype(view, jnp.bfloat16).dtype == jnp.bfloat16  # pyright: ignore
    assert views.astype(view, jnp.int32) is None
    assert views.astype(view, jnp.float8_e4m3fn) is None


def test_a_slice_along_the_blocks_is_no_view_and_a_whole_one_is_the_same():
    view = views.view_of(kernel(4, 32, 48), 0)
    assert views.take(view, 1, 0, 16) is None
    assert views.take(view, 2, 0, 48) is view


def test_a_slice_of_whole_blocks_is_a_view_of_less_storage():
    view = views.view_of(kernel(4, 64, 40), 0)  # blocks are 32 in, 16 out
    for dimension, start, size in [(1, 32, 32), (2, 16, 16), (2, 16, 24)]:
        piece = views.take(view, dimension, start, size)
        assert piece is not None
        assert piece.stored.qvalue.size < view.stored.qvalue.size
        expected = np.asarray(view.stored.dequantize()).take(range(start, start + size), dimension)
        np.testing.assert_array_equal(views.dequantize(piece), expected)
        assert not views.is_whole(piece, view.stored)
    assert views.take(view, 2, 16, 16, step=2) is None
    assert views.take(view, 2, jnp.int32(16), 16) is None


@pytest.mark.parametrize("dimension", [0, 1, 2])
@pytest.mark.parametrize("fill", [False, True])
def test_gather_takes_values_and_scales(dimension, fill):
    view, index = views.view_of(kernel(4, 64, 40), 0), np.array([3, 0, 63, -1])
    rows = views.gather(view, dimension, jnp.asarray(index), fill)
    assert rows is not None
    w, n = np.asarray(view.stored.dequantize()), view.shape[dimension]
    expected = np.moveaxis(w.take(index.clip(0, n - 1), dimension), dimension, 0).copy()
    if fill:
        expected[(index < 0) | (index >= n)] = np.nan
    actual = np.moveaxis(np.asarray(views.dequantize(rows)), dimension, 0)
    np.testing.assert_array_equal(actual, expected)


def test_a_stack_of_whole_blocks_joins_the_output():
    view = views.view_of(kernel(6, 4, 64, 32), 0)
    last = views.take(view, 0, jnp.int32(3), 1)
    for whole in (view, last):
        assert whole is not None
        joined = views.join_stack(whole, whole.dims[1])
        assert joined.stored.qvalue.shape == (6, 128, 64)
        assert joined.dims[1:] == (
            (Factor(OUT, 4, 32),),
            (Factor(IN, 64, 1),),
            (Factor(OUT, 32, 1),),
        )
        np.testing.assert_array_equal(views.dequantize(joined), views.dequantize(whole))


def test_what_is_in_no_whole_blocks_or_not_last_stays_a_stack():
    cut = views.view_of(kernel(4, 64, 24), 0)
    assert views.join_stack(cut, cut.dims[0]) is cut
    view = views.view_of(kernel(6, 4, 64, 32), 0)
    assert views.join_stack(view, view.dims[0]) is view
    some = views.take(view, 1, 1, 2)
    assert some is not None
    assert views.join_stack(some, some.dims[1]) is some


@pytest.mark.parametrize("start", [-3, 0, 2, 9])
@pytest.mark.parametrize("traced", [False, True])
def test_starts_are_clamped_as_in_a_dynamic_slice(start, traced):
    view = views.view_of(kernel(4, 16, 16), 0)
    piece = views.take(view, 0, jnp.asarray(start) if traced else start, 2)
    assert piece is not None
    at = min(max(start, 0), 2)
    np.testing.assert_array_equal(views.dequantize(piece), view.stored.dequantize()[at : at + 2])


@st.composite
def steps(draw):
    """A few transposes, reshapes and slices of the stack."""
    return draw(st.lists(st.integers(0, 2**16), min_size=1, max_size=6))


@hypothesis.given(steps())
def test_any_sequence_of_steps(seeds):
    view = views.view_of(kernel(4, 6, 16, 32), 0)
    expected = np.asarray(view.stored.dequantize())
    for seed in seeds:
        rng = np.random.default_rng(seed)
        kind = rng.integers(3)
        if kind == 0:
            order = rng.permutation(expected.ndim).tolist()
            view, expected = views.transpose(view, order), expected.transpose(order)
        elif kind == 1:
            sizes: list[int] = [*expected.shape]
            i = int(rng.integers(len(sizes)))
            if sizes[i] % 2 == 0 and len(sizes) < 7:
                sizes[i : i + 1] = [2, sizes[i] // 2]
            elif i:
                sizes[i - 1 : i + 1] = [sizes[i - 1] * sizes[i]]
            new = views.reshape(view, sizes)
            if new is not None:
                view, expected = new, expected.reshape(sizes)
        else:
            i = int(rng.integers(expected.ndim))
            start = int(rng.integers(expected.shape[i]))
            size = int(rng.integers(1, expected.shape[i] - start + 1))
            new = views.take(view, i, start, size)
            if new is not None:
                view = new
                expected = expected[(slice(None),) * i + (slice(start, start + size),)]
        assert view.shape == expected.shape
    np.testing.assert_array_equal(views.dequantize(view), expected)
