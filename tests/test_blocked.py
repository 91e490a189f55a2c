"""Blocked FP8 to the byte: golden data, IEEE arithmetic in numpy, error bounds, bad weights."""

# pyright: reportArgumentType=false
# (`weight_block_size` takes an int too, and becomes a pair)

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy_reference
import pytest
from hypothesis import given, settings, strategies as st
from jax import lax
from numpy_reference import (
    BF16,
    DTYPES,
    KINDS,
    differing,
    expand,
    heavy_tailed,
    make_weight,
    normal,
)

from jaxquant import blocked
from jaxquant.config import FMT_DTYPES, QuantConfig
from jaxquant.errors import JaxquantError
from jaxquant.matmul import matmul


def assert_same_bytes(qa: Any, expected: tuple[np.ndarray, np.ndarray]) -> None:
    assert (differing(qa.qvalue, expected[0]), differing(qa.scale, expected[1])) == (0, 0)


# Few shapes, as each is compiled once; the values vary.
SHAPES: list[tuple[tuple[int, ...], Any]] = [
    ((1, 1), 128),
    ((129, 257), 128),  # edges one wide
    ((128, 256), (64, 128)),
    ((5, 300), (1, 128)),
    ((33, 7), (8, 3)),
    ((9, 10), 4096),  # a block larger than the matrix
    ((2, 3, 20, 130), (16, 128)),
]
CONFIGS = [
    QuantConfig(fmt=fmt, scale_fmt=scale_fmt, weight_block_size=(1, 1))
    for fmt in ("e4m3", "e5m2")
    for scale_fmt in (None, "ue8m0")
]


# Each is compiled for each shape, so not every pair.
CONFIGS_AND_DTYPES = [
    (QuantConfig(), BF16),
    (QuantConfig(), np.dtype(np.float32)),
    (QuantConfig(scale_fmt="ue8m0"), np.dtype(np.float16)),
    (QuantConfig(fmt="e5m2"), BF16),
]


def config_like(config: QuantConfig, block: Any) -> QuantConfig:
    return QuantConfig(fmt=config.fmt, scale_fmt=config.scale_fmt, weight_block_size=block)


seeds = st.integers(0, 2**32 - 1)
# Values of all dtypes, in float32.
weights = st.tuples(st.sampled_from(KINDS), st.sampled_from(DTYPES), seeds)

# Golden data --------------------------------------------------------------------------------------

GOLDEN = np.load(Path(__file__).parent / "golden" / "blocked_fp8.npz")
GOLDEN_CASES = sorted({name.split(".")[0] for name in GOLDEN.files})


def golden(case: str) -> tuple[np.ndarray, QuantConfig, tuple[np.ndarray, np.ndarray]]:
    fmt, block, scale_fmt, _ = GOLDEN[f"{case}.meta"]
    config = QuantConfig(
        fmt=str(fmt),
        weight_block_size=int(block),
        scale_fmt=None if scale_fmt == "none" else str(scale_fmt),
    )
    qvalue = GOLDEN[f"{case}.qvalue_bytes"].view(config.fmt_dtype)
    return GOLDEN[f"{case}.weight_bf16_bits"].view(BF16), config, (qvalue, GOLDEN[f"{case}.scale"])


def test_golden_data_is_all_there():
    assert len(GOLDEN_CASES) == 12


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_reference_is_lmdeploys_to_the_byte(case):
    w, config, expected = golden(case)
    qvalue, scale = numpy_reference.quantize(w, config)
    assert (differing(qvalue, expected[0]), differing(scale, expected[1])) == (0, 0)


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_golden_bytes_jitted_and_under_a_larger_jit(case):
    w, config, expected = golden(case)
    assert_same_bytes(blocked.quantize(jnp.asarray(w), config), expected)

    @jax.jit
    def forward(w, x):
        qa = blocked.quantize(w * 1, config)  # between two other fusions
        return qa, matmul(x, qa) if qa.ndim == 2 else None, jnp.sum(qa.scale)

    assert_same_bytes(forward(w, jnp.ones((3, w.shape[-1])))[0], expected)


@pytest.mark.parametrize("case", ["ragged", "ue8m0", "experts"])
def test_golden_bytes_eager(case):
    w, config, expected = golden(case)
    with jax.disable_jit():
        assert_same_bytes(blocked.quantize(jnp.asarray(w), config), expected)


@pytest.mark.parametrize("case", ["ragged", "ue8m0"])
@pytest.mark.parametrize("transform", ["vmap", "map", "scan"])
def test_golden_bytes_vmapped_and_looped(case, transform):
    w, config, expected = golden(case)
    stack = jnp.stack([w, -jnp.asarray(w), jnp.asarray(w) * 2])
    quantize = functools.partial(blocked.quantize, config=config)
    if transform == "vmap":
        qa = jax.vmap(quantize)(stack)
    elif transform == "map":
        qa = lax.map(quantize, stack)
    else:
        qa = lax.scan(lambda n, w: (n + 1, quantize(w)), 0, stack)[1]
    assert_same_bytes(jax.tree.map(lambda x: x[0], qa), expected)
    assert_same_bytes(jax.tree.map(lambda x: x[1], qa), (-expected[0], expected[1]))
    assert_same_bytes(jax.tree.map(lambda x: x[2], qa), (expected[0], 2 * expected[1]))


# Against the reference ----------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "block"), SHAPES)
@given(case=st.sampled_from(CONFIGS_AND_DTYPES), kind=st.sampled_from(KINDS), seed=seeds)
def test_same_bytes_as_ieee_arithmetic(shape, block, case, kind, seed):
    config, dtype = case
    config, w = config_like(config, block), make_weight(kind, shape, dtype, seed)
    qa = blocked.quantize(jnp.asarray(w), config)
    assert qa.scale.shape == (*shape[:-2], *blocked.grid_shape(shape, config.weight_block_size))
    assert qa.dtype == dtype
    assert_same_bytes(qa, numpy_reference.quantize(w, config))
    blocked.check_finite(qa, "w")


@pytest.mark.parametrize("config", CONFIGS, ids=QuantConfig.describe)
def test_same_bytes_as_ieee_arithmetic_on_a_million_weights(config):
    # A multiplication by the reciprocal differs in up to 1% of these.
    w = make_weight(heavy_tailed, (1024, 1031), BF16, seed=1)
    w32 = make_weight(normal, (1024, 1031), np.dtype(np.float32), seed=2)
    config = config_like(config, 128)
    assert_same_bytes(blocked.quantize(jnp.asarray(w), config), numpy_reference.quantize(w, config))
    assert_same_bytes(
        blocked.quantize(jnp.asarray(w32), config), numpy_reference.quantize(w32, config)
    )


def test_scales_are_ieee_quotients_for_a_million_amaxes():
    w = make_weight(heavy_tailed, (1000, 1000), np.dtype(np.float32), seed=3)
    config = QuantConfig(weight_block_size=1)
    assert_same_bytes(blocked.quantize(jnp.asarray(w), config), numpy_reference.quantize(w, config))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: jnp.broadcast_to(x[0][:, None], x.shape),
        lambda x: jnp.maximum(x, 0).astype(jnp.bfloat16),
        lambda x: jnp.round(100 * x).astype(jnp.int32).astype(jnp.float32),
        lambda x: jnp.ones_like(x) / 3,
        lambda x: x.T[::-1],
    ],
    ids=["broadcast", "relu", "from_int", "constant", "transpose"],
)
def test_what_makes_the_weight_does_not_change_the_bytes(make):
    """The compiler sees how the weight was made and may simplify; the division stays one."""
    x = jnp.asarray(make_weight(normal, (200, 200), np.dtype(np.float32), seed=4))

    @jax.jit
    def fused(x):
        w = make(x)
        return w, blocked.quantize(w)

    w, qa = fused(x)
    assert_same_bytes(qa, numpy_reference.quantize(np.asarray(w), QuantConfig()))


def test_bytes_do_not_depend_on_neighbours():
    """Whole blocks of a part of the weight are quantized as they are in the whole."""
    w = jnp.asarray(make_weight(heavy_tailed, (300, 400), BF16, seed=5))
    whole, part = blocked.quantize(w), blocked.quantize(w[128:256, 128:])
    assert_same_bytes(part, (np.asarray(whole.qvalue)[128:256, 128:], whole.scale[1:2, 1:]))


# The scale ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FMT_DTYPES)
@given(weight=weights)
def test_ue8m0_scales_are_the_least_power_of_two_that_fits(fmt, weight):
    kind, dtype, seed = weight
    w = make_weight(kind, (20, 33), dtype, seed).astype(np.float32)
    config = QuantConfig(fmt=fmt, scale_fmt="ue8m0", weight_block_size=(4, 16))
    qa = blocked.quantize(jnp.asarray(w), config)
    scale = np.asarray(qa.scale, np.float64)
    fraction, _ = np.frexp(scale)
    assert (fraction == 0.5).all()
    padded = np.zeros((20, 48))
    padded[:, :33] = np.abs(w.astype(np.float64))
    amax = np.maximum(padded.reshape(5, 4, 3, 16).max((1, 3)), np.float32(1e-6))
    fmax = float(ml_dtypes.finfo(config.fmt_dtype).max)
    assert (scale >= amax / fmax).all()
    assert (scale / 2 < amax / fmax).all()


@pytest.mark.parametrize("fmt", FMT_DTYPES)
def test_ue8m0_at_the_edge_of_a_power_of_two(fmt):
    """One ulp above `fmax * 2^k` takes the next power, `fmax * 2^k` itself does not."""
    fmax = np.float32(ml_dtypes.finfo(FMT_DTYPES[fmt]).max)
    exact = fmax * np.ldexp(np.float32(1), np.arange(-20, 20, dtype=np.int32))
    above = np.nextafter(exact, np.float32(np.inf))
    config = QuantConfig(fmt=fmt, scale_fmt="ue8m0", weight_block_size=1)
    exact_qa = blocked.quantize(jnp.asarray(exact[None]), config)
    above_qa = blocked.quantize(jnp.asarray(above[None]), config)
    np.testing.assert_array_equal(exact_qa.scale[0], exact / fmax)
    np.testing.assert_array_equal(above_qa.scale[0], 2 * exact / fmax)


@pytest.mark.parametrize("fmt", FMT_DTYPES)
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_zero_blocks_have_the_floors_scale_and_zero_values(fmt, scale_fmt):
    config = QuantConfig(fmt=fmt, scale_fmt=scale_fmt)
    qa = blocked.quantize(jnp.zeros((130, 10), jnp.bfloat16), config)
    floor = np.float32(1e-6) / np.float32(ml_dtypes.finfo(config.fmt_dtype).max)
    expected = floor if scale_fmt is None else np.float32(2.0 ** np.ceil(np.log2(floor)))
    np.testing.assert_array_equal(qa.scale, np.full((2, 1), expected))
    assert not np.asarray(qa.qvalue).view(np.uint8).any()
    assert not np.asarray(blocked.dequantize(qa)).any()


def test_negative_zero_keeps_its_sign():
    qa = blocked.quantize(jnp.asarray([[-0.0, 0.0, -1e-30, 1.0]]))
    np.testing.assert_array_equal(np.asarray(qa.qvalue).view(np.uint8), [[0x80, 0, 0x80, 0x7E]])


# Dequantizing -------------------------------------------------------------------------------------


def test_dequantize_is_the_product_per_block_and_one_rounding():
    w = make_weight(normal, (3, 129, 257), np.dtype(np.float32), seed=6)
    qa = blocked.quantize(jnp.asarray(w))
    full = expand(np.asarray(qa.scale), (128, 128), w.shape)
    product = np.asarray(qa.qvalue).astype(np.float32) * full
    for dtype in DTYPES:
        assert differing(blocked.dequantize(qa, dtype), product.astype(dtype)) == 0
    assert blocked.dequantize(qa).dtype == jnp.bfloat16
    assert qa.dequantize().dtype == jnp.float32


def below_overflow(w: np.ndarray) -> np.ndarray:
    """Rounding to FP8 may take the largest floats up to 2^128."""
    return np.clip(w.astype(np.float32), -(2.0**127), 2.0**127)


@pytest.mark.parametrize("config", CONFIGS, ids=QuantConfig.describe)
@given(weight=weights)
def test_dequantize_error_is_at_most_half_an_ulp(config, weight):
    """Per weight, `|w - w'| <= scale * max(|w / scale| * 2^-p, smallest / 2)`.

    A quotient in the normal range of FP8 with p bits of significand (4 for e4m3, 3 for e5m2) is
    rounded by at most 2^-p of itself, one below it by half the smallest subnormal. Three float32
    roundings (scale, quotient, product) add 2^-24 each.
    """
    kind, dtype, seed = weight
    w = below_overflow(make_weight(kind, (40, 72), dtype, seed))
    qa = blocked.quantize(jnp.asarray(w), config_like(config, (16, 32)))
    info = ml_dtypes.finfo(config.fmt_dtype)
    exact = w.astype(np.float64)
    scale = expand(np.asarray(qa.scale, np.float64), (16, 32), w.shape)
    bound = np.maximum(
        np.abs(exact) * 2.0 ** -(info.nmant + 1), scale * info.smallest_subnormal / 2
    )
    bound += 3 * 2.0**-24 * np.abs(exact)
    error = np.abs(exact - np.asarray(blocked.dequantize(qa, jnp.float32), np.float64))
    assert (error <= bound).all()


@given(weight=weights, config=st.sampled_from(CONFIGS))
def test_requantizing_what_was_dequantized_changes_nothing_but_rounding(weight, config):
    """With power-of-two scales everything is exact, except where all of a block rounds down.

    There amax, and so the scale, may halve. With float32 scales the block's largest value is
    `fmax * scale` rounded, so that the scale may move by an ulp; the values stay.
    """
    kind, dtype, seed = weight
    w = below_overflow(make_weight(kind, (24, 40), dtype, seed))
    config = config_like(config, (8, 16))
    first = blocked.quantize(jnp.asarray(w), config)
    again = blocked.quantize(blocked.dequantize(first, jnp.float32), config)
    kept = np.asarray(first.scale) == np.asarray(again.scale)
    if config.scale_fmt == "ue8m0":
        w1, w2 = blocked.dequantize(first, jnp.float32), blocked.dequantize(again, jnp.float32)
        fits = np.asarray(again.scale) <= np.asarray(first.scale)
        assert fits.all()
        assert differing(w1, w2) == 0
        kept = expand(kept, (8, 16), w.shape)
        assert not (np.asarray(first.qvalue) != np.asarray(again.qvalue))[kept].any()
    else:
        np.testing.assert_allclose(again.scale, first.scale, rtol=2**-23)
        assert differing(first.qvalue, again.qvalue) == 0


# What is not finite -------------------------------------------------------------------------------

NOT_FINITE = [np.nan, -np.nan, np.inf, -np.inf]


@given(
    shape_block=st.sampled_from(SHAPES),
    bad=st.sampled_from(NOT_FINITE),
    case=st.sampled_from(CONFIGS_AND_DTYPES),
    seed=seeds,
)
@settings(max_examples=100)
def test_nan_or_inf_anywhere_is_found_and_named(shape_block, bad, case, seed):
    (shape, block), (config, dtype) = shape_block, case
    config = config_like(config, block)
    w = make_weight(normal, shape, dtype, seed)
    where = tuple(int(i) for i in np.random.default_rng(seed).integers(0, shape))
    w[where] = bad
    qa = blocked.quantize(jnp.asarray(w), config)
    bo, bi = config.weight_block_size
    first = (*where[:-2], where[-2] // bo, where[-1] // bi)
    with pytest.raises(JaxquantError) as e:
        blocked.check_finite(qa, "layers/0/q_proj")
    assert str(e.value).startswith(
        f"layers/0/q_proj: NaN or Inf in 1 of {qa.scale.size} blocks (first: block {first}); "
    )


def test_check_finite_counts_blocks_and_names_the_first():
    w = np.ones((4, 6), np.float32)
    w[3, 0] = w[1, 5] = np.inf
    qa = blocked.quantize(jnp.asarray(w), QuantConfig(weight_block_size=2))
    with pytest.raises(JaxquantError, match=r"^w: NaN or Inf in 2 of 6 blocks .*block \(0, 2\)\)"):
        blocked.check_finite(qa, "w")


def test_nan_leaves_other_blocks_alone():
    w = make_weight(normal, (6, 8), np.dtype(np.float32), seed=7)
    clean = blocked.quantize(jnp.asarray(w), QuantConfig(weight_block_size=4))
    w[5, 7] = np.nan
    qa = blocked.quantize(jnp.asarray(w), QuantConfig(weight_block_size=4))
    assert differing(qa.scale, clean.scale) == 1
    assert differing(qa.qvalue[:4], clean.qvalue[:4]) == 0


def test_quantize_is_pure_and_traces_no_callback():
    jaxpr = str(jax.make_jaxpr(lambda w: blocked.quantize(w))(jnp.ones((130, 130))))
    assert "callback" not in jaxpr
    assert "effects" not in jaxpr


# Activations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (128,), (3, 129), (2, 5, 384)])
@given(weight=weights)
def test_activations_are_groups_of_128_to_the_byte(shape, weight):
    kind, dtype, seed = weight
    x = make_weight(kind, (1, *shape) if len(shape) == 1 else shape, dtype, seed).reshape(shape)
    qvalue, scale = blocked.quantize_activations(jnp.asarray(x))
    expected = numpy_reference.quantize_activations(x)
    assert (differing(qvalue, expected[0]), differing(scale, expected[1])) == (0, 0)


def test_activations_equal_ieee_arithmetic_on_a_million_elements():
    x = make_weight(heavy_tailed, (1000, 1100), np.dtype(np.float32), seed=8)
    qvalue, scale = blocked.quantize_activations(jnp.asarray(x))
    expected = numpy_reference.quantize_activations(x)
    assert (differing(qvalue, expected[0]), differing(scale, expected[1])) == (0, 0)


def test_activation_floor_is_1e_10_and_zero_rows_give_zeros():
    x = jnp.asarray([[0.0] * 4, [1e-12] * 4, [1e-10] * 4, [2e-10] * 4])
    qvalue, scale = blocked.quantize_activations(x)
    floor = np.float32(1e-10) / np.float32(448)
    np.testing.assert_array_equal(scale[:3, 0], [floor] * 3)
    assert scale[3, 0] > floor
    np.testing.assert_array_equal(np.asarray(qvalue[:, 0], np.float32), [0, 4.5, 448, 448])


def test_a_tokens_activations_do_not_depend_on_the_batch():
    x = jnp.asarray(make_weight(heavy_tailed, (7, 300), BF16, seed=9))
    all_q, all_s = blocked.quantize_activations(x)
    for m in range(7):
        q, s = blocked.quantize_activations(x[m])
        assert (differing(q, all_q[m]), differing(s, all_s[m])) == (0, 0)


# Moved and widened --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FMT_DTYPES.values(), ids=FMT_DTYPES)
def test_every_fp8_value_widens_exactly(dtype):
    qvalue = np.arange(256, dtype=np.uint8).view(dtype)
    wide, expected = jax.jit(blocked.widen)(qvalue), qvalue.astype(np.float32)
    assert wide.dtype == jnp.float32
    np.testing.assert_array_equal(wide, expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(wide)[numbers], np.signbit(expected)[numbers])


@pytest.mark.parametrize("dtype", FMT_DTYPES.values(), ids=FMT_DTYPES)
def test_narrowing_rounds_to_the_nearest_ties_to_even(dtype):
    """Each 1009th float32 there is, every FP8 value, and what lies next to and between them."""
    fmax = float(jnp.finfo(dtype).max)
    x = np.arange(0, 2**32, 1009, dtype=np.uint64).astype(np.uint32).view(np.float32)
    values = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    values = np.sort(values[np.isfinite(values)])
    ties = (values[1:] + values[:-1]) / 2
    near = [np.nextafter(v, np.float32(to)) for v in (values, ties) for to in (-np.inf, np.inf)]
    x = np.concatenate([x, values, ties, *near])
    x = np.clip(x[~np.isnan(x)], -fmax, fmax)
    narrow = jax.jit(blocked.narrow, static_argnums=1)
    assert differing(narrow(x, np.dtype(dtype)), x.astype(dtype)) == 0
    assert np.isnan(narrow(np.full(8, np.nan, np.float32), np.dtype(dtype))).all()


@pytest.mark.parametrize("dtype", [*DTYPES, *FMT_DTYPES.values()], ids=str)
def test_layers_are_taken_and_rows_put_bit_for_bit(dtype):
    bits = np.random.default_rng(0).integers(0, 256, (3, 4, 6, dtype.itemsize), np.uint8)
    stack = bits.view(dtype)[..., 0]
    for layer in range(3):
        assert differing(jax.jit(blocked.take_layer)(stack, layer), stack[layer]) == 0
    rows = stack[1, :2]
    expected = stack.copy()
    expected[2, 1:3] = rows
    assert differing(jax.jit(blocked.put)(stack, rows, (2,), 1), expected) == 0
    matrix = stack[0].copy()
    matrix[2:] = rows
    assert differing(blocked.put(jnp.asarray(stack[0]), jnp.asarray(rows), (), 2), matrix) == 0


# Edges and bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (0, 4, 5), (3, 4, 0)])
def test_empty_weights(shape):
    qa = blocked.quantize(jnp.zeros(shape))
    assert qa.shape == shape
    assert qa.scale.shape == (*shape[:-2], *blocked.grid_shape(shape, (128, 128)))
    assert blocked.dequantize(qa).shape == shape
    blocked.check_finite(qa, "w")


@pytest.mark.parametrize("shape", [(0, 130), (3, 0), (0,)])
def test_empty_activations(shape):
    qvalue, scale = blocked.quantize_activations(jnp.zeros(shape))
    assert qvalue.shape == shape
    assert scale.shape == (*shape[:-1], -(-shape[-1] // 128))


def test_numpy_weights_are_taken():
    w = make_weight(normal, (20, 30), BF16, seed=10)
    assert_same_bytes(blocked.quantize(w), numpy_reference.quantize(w, QuantConfig()))


def test_an_unknown_implementation_is_refused_with_the_known_ones():
    with pytest.raises(JaxquantError) as e:
        blocked.quantize(jnp.ones((2, 2)), implementation="cuda")
    assert str(e.value) == "quantize: implementation is 'cuda'; allowed: mosaic_gpu, xla"


def test_a_forced_kernel_says_why_it_cannot_run():
    with pytest.raises(NotImplementedError, match=r"^mosaic_gpu: the device is a cpu; "):
        blocked.quantize(jnp.ones((2, 16)), implementation="mosaic_gpu")


@pytest.mark.parametrize("w", [jnp.float32(1), jnp.ones(3)], ids=["scalar", "vector"])
def test_fewer_than_two_dimensions_are_refused(unchecked, w):
    with pytest.raises(JaxquantError) as e:
        blocked.quantize(w)
    assert str(e.value) == f"quantize: shape {w.shape}; a weight has 2 or more dimensions"


@pytest.mark.parametrize(
    "dtype", [np.int8, np.int32, np.bool_, np.complex64, *FMT_DTYPES.values()], ids=str
)
def test_dtypes_that_are_no_weights_are_refused(unchecked, dtype):
    with pytest.raises(JaxquantError) as e:
        blocked.quantize(np.ones((2, 2), dtype))
    name = np.dtype(dtype).name
    assert str(e.value) == f"quantize: dtype {name}; allowed: bfloat16, float16, float32"


def test_float64_weights_dequantize_without_a_warning():
    """numpy makes float64 by default, which jax does not have by default."""
    w = np.random.default_rng(0).standard_normal((4, 4))
    qa = blocked.quantize(w)
    assert_same_bytes(qa, numpy_reference.quantize(w.astype(np.float32), QuantConfig()))
    assert qa.dequantize().dtype == jnp.float32


def test_a_quotient_that_is_off_by_a_few_ulp_is_corrected_to_ieee_division():
    """GPUs divide to within 2 ulp; the correction is plain arithmetic, so a CPU shows it right."""
    rng = np.random.default_rng(0)
    a = (rng.normal(size=1 << 18) * 2.0 ** rng.integers(-30, 30, 1 << 18)).astype(np.float32)
    b = (rng.uniform(1, 2, 1 << 18) * 2.0 ** rng.integers(-30, 30, 1 << 18)).astype(np.float32)
    for ulps in (-2, -1, 0, 1, 2):
        quotient = ((a / b).view(np.int32) + ulps).view(np.float32)
        corrected = np.asarray(jax.jit(blocked._corrected)(quotient, a, b))
        np.testing.assert_array_equal(corrected, a / b)
    zeros = jnp.zeros(4, jnp.float32)
    np.testing.assert_array_equal(blocked._corrected(zeros, zeros, jnp.asarray(b[:4])), zeros)
