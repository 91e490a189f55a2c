"""The kernel of experts on Hopper, by Pallas's interpreter, against float64."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
from hopper import on_hopper
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from numpy_reference import BF16, heavy_tailed, make_weight, normal, zero_blocks

from jaxquant import blocked
from jaxquant.config import QuantConfig
from jaxquant.matmul import SiluMul, grouped, grouped_matmul, grouped_sm90, mosaic_gpu
from jaxquant.matmul.grouped_sm90 import Config

# Few, so that a thread block goes through several tiles.
SMS = 2


@pytest.fixture
def hopper(monkeypatch):
    with on_hopper(monkeypatch, mosaic_gpu, sms=SMS):
        yield


@functools.cache
def experts(shape, kind=normal):
    return blocked.quantize(jnp.asarray(make_weight(kind, shape, BF16, 0)), QuantConfig())


def tokens(T, K, kind=normal):
    return jnp.asarray(make_weight(kind, (T, K), BF16, 1))


def definition(x, w, sizes):
    """The product in float64, zeros beyond the groups."""
    xq, sx = numpy_reference.quantize_activations(np.asarray(x))
    a = numpy_reference.dequantize(xq, sx, (1, 128))
    b = numpy_reference.dequantize(np.asarray(w.qvalue), np.asarray(w.scale), (128, 128))
    y, start = np.zeros((len(x), b.shape[-2])), 0
    for matrix, size in zip(b, sizes, strict=True):
        y[start : start + size] = a[start : start + size] @ matrix.T
        start += size
    return y


def assert_close(y, expected):
    # What rounding to bfloat16 costs.
    error = np.linalg.norm(np.asarray(y, np.float64) - expected)
    assert error <= 3e-3 * np.linalg.norm(expected)


def of_layer(w, layer):
    return jax.tree.map(lambda leaf: leaf[layer], w)


@pytest.mark.parametrize(
    ("sizes", "N", "K"),
    [
        ([1, 0, 0, 0], 64, 128),
        ([3, 0, 5, 9], 192, 256),
        ([3, 0, 5, 90], 200, 256),  # rows of two scales
        ([300, 0, 12], 192, 128),
        ([2, 71, 0, 6], 128, 128),
        ([1] * 5 + [0, 0, 2], 64, 256),
    ],
)
def test_a_row_is_by_the_matrix_of_its_group(hopper, sizes, N, K):
    x, w = tokens(sum(sizes), K), experts((len(sizes), N, K))
    y = grouped_matmul(x, w, jnp.asarray(sizes, jnp.int32))
    assert (y.shape, y.dtype) == ((sum(sizes), N), BF16)
    assert_close(y, definition(x, w, sizes))


@pytest.mark.parametrize("sizes", [[0, 3, 0, 8], [0, 0, 0, 0], [1, 0, 0, 0]])
def test_rows_beyond_the_groups_are_zeros(hopper, sizes):
    x, w = tokens(29, 128), experts((4, 64, 128))
    y = grouped_matmul(x, w, jnp.asarray(sizes, jnp.int32))
    assert_close(y, definition(x, w, sizes))
    assert not np.asarray(y[sum(sizes) :]).any()


def run(x, w, sizes, config):
    """The kernel alone, with a config."""
    T, (xq, sx) = len(x), numpy_reference.quantize_activations(np.asarray(x))
    xq = np.pad(xq, ((0, -T % 8), (0, 0)))
    sx = np.pad(sx.T, ((0, 0), (0, -T % 64)))
    return grouped_sm90.grouped(
        jnp.asarray(xq), jnp.asarray(sx), w.qvalue, w.scale,
        jnp.asarray(sizes, jnp.int32), jnp.zeros(1, jnp.int32),
        T=T, config=config, sms=SMS,
    )  # fmt: skip


@pytest.mark.parametrize(("T", "N"), [(1, 64), (16, 64), (200, 64), (5000, 64), (5000, 256)])
def test_every_width_of_a_config(hopper, T, N):
    config = grouped_sm90.default_config(T, 8, N, SMS)
    assert config.waves == (2 if N == 256 else 1)
    # A group that fills each width less one row, with an offset; and one that is cut.
    sizes = [3, *(w - 4 for w in config.widths), 2 * config.widths[-1] + 5]
    x, w = tokens(sum(sizes), 128), experts((len(sizes), N, 128))
    assert_close(run(x, w, sizes, config), definition(x, w, sizes))


def test_tiles_of_two_waves_that_overlap(hopper):
    sizes = [3, 30, 0, 57]
    x, w = tokens(95, 256), experts((4, 384, 256))
    assert_close(run(x, w, sizes, Config((16, 40), 256)), definition(x, w, sizes))


@pytest.mark.parametrize(
    ("T", "E", "N", "config"),
    [
        (32768, 128, 1536, Config((64, 80, 88, 96), 256)),  # groups of 256: three tiles of 88
        (32768, 64, 2816, Config((64, 80, 88, 96), 256)),
        (32768, 64, 1408, Config((64, 96, 112, 120, 128, 136, 144))),  # not whole tiles of 256
        (32768, 8, 2816, Config((64, 88, 96), 256)),
        (512, 128, 1536, Config((8, 16, 32, 64))),
    ],
)
def test_tiles_are_as_the_groups_are_likely_to_be(T, E, N, config):
    assert grouped_sm90.default_config(T, E, N, 132) == config


def test_more_groups_than_a_warp_has_lanes(hopper):
    E = 133
    sizes = np.random.default_rng(0).multinomial(90, np.full(E, 1 / E))
    x, w = tokens(90, 128), experts((E, 64, 128))
    assert_close(grouped_matmul(x, w, jnp.asarray(sizes, jnp.int32)), definition(x, w, sizes))


@pytest.mark.parametrize("kind", [zero_blocks, heavy_tailed])
def test_values_that_are_hard(hopper, kind):
    x, w, sizes = tokens(23, 256, kind), experts((3, 128, 256), kind), [11, 2, 10]
    assert_close(grouped_matmul(x, w, jnp.asarray(sizes, jnp.int32)), definition(x, w, sizes))


def test_a_traced_layer_of_a_stack(hopper):
    sizes, w, x = [2, 0, 9], experts((2, 3, 64, 128)), tokens(11, 128)
    of = lambda l: grouped_matmul(x, w, jnp.asarray(sizes, jnp.int32), layer=l)  # noqa: E731
    _, ys = lax.scan(lambda _, l: (None, of(l)), None, jnp.asarray([0, 1, -2]))
    for y, layer in zip(ys, (0, 1, 0), strict=True):
        assert_close(y, definition(x, of_layer(w, layer), sizes))


def test_batches_are_one_product_after_the_other(hopper):
    w, sizes = experts((3, 64, 128)), [[4, 0, 7], [0, 11, 0]]
    x = jnp.stack([tokens(11, 128), -tokens(11, 128)])
    ys = jax.vmap(grouped_matmul, (0, None, 0))(x, w, jnp.asarray(sizes, jnp.int32))
    for y, one, of in zip(ys, x, sizes, strict=True):
        assert_close(y, definition(one, w, of))


def test_the_derivative_is_straight_through(hopper):
    x, w, sizes = tokens(9, 128), experts((2, 64, 128)), jnp.asarray([4, 5], jnp.int32)
    y, dy = jax.jvp(lambda x: grouped_matmul(x, w, sizes), (x,), (x,))
    assert np.array_equal(y, grouped_matmul(x, w, sizes))
    assert_close(dy, np.asarray(grouped_matmul(x, weight_only(w), sizes), np.float64))


def test_no_two_threads_race(monkeypatch):
    sizes = [3, 0, 20, 1]
    x, w = tokens(24, 512), experts((4, 256, 512))  # in whole tiles: else two write the same rows
    with on_hopper(monkeypatch, detect_races=True):
        y = run(x, w, sizes, Config((8, 16)))
        found = gpu_callbacks.get_races().races_found
    assert_close(y, definition(x, w, sizes))
    assert not found


def weight_only(w):
    return dataclasses.replace(w, activation_scheme=None)


@pytest.mark.parametrize(
    ("N", "K", "dtype", "change", "reason"),
    [
        (64, 128, jnp.float32, None, "the result is float32; the kernel of experts takes bfloat16"),
        (56, 128, BF16, None, "N is 56; the kernel of experts takes 64 or more"),
        (64, 96, BF16, None, "K is 96; the kernel of experts takes multiples of 128"),
        (64, 128, BF16, weight_only, "the experts are weight-only; the kernel of experts takes"),
    ],
)
def test_what_the_kernel_does_not_take_is_a_loop_and_says_why(
    hopper, caplog, N, K, dtype, change, reason
):
    x, w, sizes = tokens(9, K), experts((2, N, K)), jnp.asarray([4, 5], jnp.int32)
    w = w if change is None else change(w)
    with caplog.at_level(logging.DEBUG, logger="jaxquant.matmul.grouped"):
        y = grouped_matmul(x, w, sizes, preferred_element_type=dtype)
    assert y.dtype == dtype
    assert f"a loop over tiles; mosaic_gpu: {reason}" in caplog.text
    if change is None:
        assert_close(y, definition(x, w, [4, 5]))


@pytest.mark.parametrize("few", [0, 1000])  # gathered after quantization, and before
def test_rows_of_tokens_after_a_gate(hopper, monkeypatch, few):
    monkeypatch.setattr(grouped, "_FEW_ROWS", few)
    x, w, sizes = tokens(7, 256), experts((3, 64, 128)), [4, 0, 7]
    rows = np.random.default_rng(0).integers(0, 7, 11)
    y = grouped_matmul(
        x, w, jnp.asarray(sizes, jnp.int32), rows=jnp.asarray(rows, jnp.int32), prologue=SiluMul()
    )
    assert_close(y, definition(SiluMul()(x)[rows], w, sizes))


@pytest.mark.parametrize("few", [0, 1000])
@pytest.mark.parametrize("K", [128, 1152])  # too few groups to be written to their places, and not
def test_tokens_that_are_quantized_to_their_places(hopper, monkeypatch, K, few):
    monkeypatch.setattr(grouped, "_FEW_ROWS", few)
    x, w, sizes = tokens(7, K), experts((3, 64, K)), [9, 0, 12]
    order = jax.random.permutation(jax.random.key(0), 21)
    places, rows = order.reshape(7, 3), jnp.argsort(order) // 3
    y = grouped_matmul(x, w, jnp.asarray(sizes, jnp.int32), rows=rows, places=places)
    assert_close(y, definition(x[rows], w, sizes))
