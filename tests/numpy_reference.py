"""What jaxquant computes, written once more in numpy, and weights that are hard to get right.

numpy's float32 arithmetic is IEEE 754's, one rounding for each operation.
"""

from typing import Any

import ml_dtypes
import numpy as np

from jaxquant.config import QuantConfig

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), BF16, np.dtype(np.float16)]


def quantize(
    w: np.ndarray, config: QuantConfig, floor: float = 1e-6
) -> tuple[np.ndarray, np.ndarray]:
    """(qvalue, scale) of `jaxquant.quantize`."""
    dtype, (bo, bi) = config.fmt_dtype, config.weight_block_size
    fmax = np.float32(ml_dtypes.finfo(dtype).max)
    w = w.astype(np.float32)
    *lead, out, contracting = w.shape
    no, ni = -(-out // bo), -(-contracting // bi)
    padded = np.zeros((*lead, no * bo, ni * bi), np.float32)
    padded[..., :out, :contracting] = np.abs(w)
    amax = padded.reshape(*lead, no, bo, ni, bi).max((-3, -1))
    scale = np.maximum(amax, np.float32(floor)) / fmax
    if config.scale_fmt == "ue8m0":
        fraction, exponent = np.frexp(scale)  # scale = fraction * 2^exponent, 0.5 <= fraction < 1
        scale = np.ldexp(np.float32(1), exponent - (fraction == 0.5))
    with np.errstate(under="ignore"):
        quotient = w / expand(scale, (bo, bi), w.shape)
    return np.clip(quotient, -fmax, fmax).astype(dtype), scale


def quantize_activations(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(qvalue, scale) of groups of 128 columns, per token."""
    rows = x.reshape(-1, x.shape[-1])
    qvalue, scale = quantize(rows, QuantConfig(weight_block_size=(1, 128)), floor=1e-10)
    return qvalue.reshape(x.shape), scale.reshape(*x.shape[:-1], -1)


def dequantize(qvalue: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """`qvalue * scale` per block, exactly: in float64."""
    return qvalue.astype(np.float64) * expand(scale.astype(np.float64), block, qvalue.shape)


def expand(scale: np.ndarray, block: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """The scale of each weight."""
    full = scale.repeat(min(block[0], shape[-2]), -2).repeat(min(block[1], shape[-1]), -1)
    return full[..., : shape[-2], : shape[-1]]


def differing(a: Any, b: Any) -> int:
    """How many elements differ in their bits."""
    a, b = np.asarray(a), np.asarray(b)
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    bits = np.dtype(f"u{a.dtype.itemsize}")
    return int((a.view(bits) != b.view(bits)).sum())


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape) * 0.02


def heavy_tailed(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.exp(6 * rng.standard_normal(shape)) * rng.choice([-1, 1], shape)


def zero_blocks(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    w = normal(rng, shape)
    w[..., : shape[-2] // 2 + 1, :] = 0
    return w


def tiny(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.uniform(-9e-7, 9e-7, shape)


def huge(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.uniform(-1, 1, shape) * 1e40  # beyond the dtype: becomes its largest value


def subnormal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape) * 2e-39


def outlier(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    w = normal(rng, shape)
    w[tuple(rng.integers(0, n) for n in shape)] = 3e4
    return w


def negative_zero(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.where(rng.random(shape) < 0.5, -0.0, normal(rng, shape))


def powers_of_two(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Quotients halfway between two FP8 values, and amax exactly fmax times a power of two."""
    return rng.choice([1.75, -1.0625, 1.1875, -0.4375, 2**-10, 2**-9 * 1.5], shape) * 2.0 ** (
        rng.integers(-8, 8)
    )


KINDS = [
    normal,
    heavy_tailed,
    zero_blocks,
    tiny,
    huge,
    subnormal,
    outlier,
    negative_zero,
    powers_of_two,
]


def make_weight(kind: Any, shape: tuple[int, ...], dtype: np.dtype, seed: int) -> np.ndarray:
    largest = float(ml_dtypes.finfo(dtype).max)
    w = kind(np.random.default_rng(seed), shape)
    return np.clip(w, -largest, largest).astype(dtype)
