"""The kernel of experts with many tokens each, by Pallas's interpreter, against float64."""

import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from test_grouped_sm90 import assert_close, definition, experts, hopper, interpret, tokens

from jaxquant.matmul import grouped_gemm_sm90, grouped_matmul
from jaxquant.matmul.grouped_gemm_sm90 import grouped_gemm

__all__ = ["hopper"]  # a fixture


def run(x, w, sizes):
    """The kernel alone."""
    xq, sx = numpy_reference.quantize_activations(np.asarray(x))
    sx = np.pad(sx.T, ((0, 0), (0, -len(x) % 64)))
    return grouped_gemm(
        jnp.asarray(xq), jnp.asarray(sx), w.qvalue, w.scale,
        jnp.asarray(sizes, jnp.int32), jnp.zeros(1, jnp.int32), sms=2,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "N", "K"),
    [
        ([64], 128, 128),  # one consumer has nothing to do
        ([128, 72], 256, 256),
        ([3, 0, 61, 130, 70], 128, 384),  # neighbours in a tile's first and last rows
    ],
)
def test_a_row_is_by_the_matrix_of_its_group(sizes, N, K):
    x, w = tokens(sum(sizes), K), experts((len(sizes), N, K))
    with interpret():
        assert_close(run(x, w, sizes), definition(x, w, sizes))


@pytest.mark.parametrize("sizes", [[0, 5, 0], [0, 0, 0]])
def test_rows_beyond_the_groups_are_zeros(sizes):
    x, w = tokens(136, 128), experts((3, 128, 128))
    with interpret():
        y = run(x, w, sizes)
    assert_close(y, definition(x, w, sizes))
    assert not np.asarray(y[sum(sizes) :]).any()


def test_many_tokens_take_it(hopper, monkeypatch):
    calls = []
    monkeypatch.setattr(
        grouped_gemm_sm90, "grouped_gemm", lambda *a, **k: calls.append(a) or grouped_gemm(*a, **k)
    )
    sizes, x, w = [448], tokens(448, 128), experts((1, 128, 128))
    y = grouped_matmul(x, w, jnp.asarray(sizes, jnp.int32))
    assert_close(y, definition(x, w, sizes))
    assert calls


@pytest.mark.parametrize(
    ("T", "E", "N", "K", "taken"),
    [
        (32768, 64, 2816, 2048, True),
        (32768, 64, 1408, 1024, True),
        (32768, 64, 2816, 4096, False),  # too long
        (32768, 128, 1536, 2048, False),  # too few tokens for each
        (32768, 64, 1400, 2048, False),  # not in whole tiles
        (32769, 64, 1408, 2048, False),  # nor the tokens in what TMA counts in
    ],
)
def test_what_it_takes(T, E, N, K, taken):
    assert grouped_gemm_sm90.takes(T, E, N, K) is taken


def test_no_two_threads_race():
    sizes = [3, 0, 133]
    x, w = tokens(136, 256), experts((3, 128, 256))
    with interpret(detect_races=True):
        y = run(x, w, sizes)
        found = gpu_callbacks.get_races().races_found
    assert_close(y, definition(x, w, sizes))
    assert not found
