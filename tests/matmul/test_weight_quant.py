"""The kernel that quantizes weights, run by Pallas's interpreter, to the byte.

How its arithmetic rounds on a GPU `make test-gpu` and `benchmarks/quantize.py` check.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
from hopper import on_hopper
from jax import lax
from numpy_reference import (
    BF16,
    differing,
    heavy_tailed,
    huge,
    make_weight,
    negative_zero,
    normal,
    powers_of_two,
    subnormal,
    zero_blocks,
)

from jaxquant import blocked, tree
from jaxquant.array import QuantizedArray
from jaxquant.config import QuantConfig
from jaxquant.matmul import weight_quant

F16, F32 = np.dtype(np.float16), np.dtype(np.float32)
GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "blocked_fp8.npz")


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    with on_hopper(monkeypatch, weight_quant, sms=132):
        yield


@pytest.fixture
def taken(monkeypatch):
    """Shapes and dtypes of the weights that the kernel takes."""
    seen, quantize = [], weight_quant._quantize

    def watched(w, *args):
        seen.append((w.shape, w.dtype))
        return quantize(w, *args)

    monkeypatch.setattr(weight_quant, "_quantize", watched)
    return seen


def assert_bytes(qa: QuantizedArray, qvalue: np.ndarray, scale: np.ndarray) -> None:
    assert (differing(qa.qvalue, qvalue), differing(qa.scale, scale)) == (0, 0)


@pytest.mark.parametrize(
    ("shape", "kind", "dtype", "fmt", "scale_fmt"),
    [
        ((2, 200, 576), normal, BF16, "e4m3", None),
        ((1, 16), normal, BF16, "e4m3", "ue8m0"),
        ((136, 48), heavy_tailed, BF16, "e5m2", "ue8m0"),
        ((130, 272), powers_of_two, F32, "e4m3", "ue8m0"),
        ((2, 1, 129, 160), heavy_tailed, F16, "e5m2", None),
        ((128, 256), zero_blocks, BF16, "e4m3", None),
        ((130, 128), huge, BF16, "e4m3", None),
        ((130, 128), subnormal, F32, "e4m3", None),
        ((130, 128), negative_zero, BF16, "e4m3", None),
    ],
)
def test_weights_are_quantized_to_the_byte(taken, shape, kind, dtype, fmt, scale_fmt):
    w, config = make_weight(kind, shape, dtype, 0), QuantConfig(fmt=fmt, scale_fmt=scale_fmt)
    qa = blocked.quantize(jnp.asarray(w), config)
    assert_bytes(qa, *numpy_reference.quantize(w, config))
    assert taken == [(shape, dtype)]


GOLDEN_CASES = sorted({name.split(".")[0] for name in GOLDEN.files})


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_golden_bytes(case):
    fmt, block, scale_fmt, _ = GOLDEN[f"{case}.meta"]
    scale_fmt = None if scale_fmt == "none" else str(scale_fmt)
    block_size = int(block), int(block)
    config = QuantConfig(fmt=str(fmt), weight_block_size=block_size, scale_fmt=scale_fmt)
    qa = blocked.quantize(jnp.asarray(GOLDEN[f"{case}.weight_bf16_bits"].view(BF16)), config)
    qvalue = GOLDEN[f"{case}.qvalue_bytes"].view(config.fmt_dtype)
    assert_bytes(qa, qvalue, GOLDEN[f"{case}.scale"])


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_what_is_not_finite_is_seen_in_the_scale_of_its_block(bad, scale_fmt):
    w = make_weight(normal, (2, 200, 272), BF16, 0)
    w[1, 199, 271] = bad
    scale = np.asarray(blocked.quantize(jnp.asarray(w), QuantConfig(scale_fmt=scale_fmt)).scale)
    assert np.argwhere(~np.isfinite(scale)).tolist() == [[1, 1, 2]]


@pytest.mark.parametrize("transform", [jax.vmap, lambda f: lambda w: lax.map(f, w)])
def test_a_batch_and_a_loop(taken, transform):
    w = jnp.asarray(make_weight(normal, (3, 130, 48), BF16, 0))
    qa = jax.jit(transform(blocked.quantize))(w)
    assert_bytes(qa, *numpy_reference.quantize(np.asarray(w), QuantConfig()))
    assert taken


def test_gradients_are_those_of_xla(monkeypatch):
    w = jnp.asarray(make_weight(normal, (16, 48), F32, 0))

    def loss(w):
        return jnp.sum(jnp.square(blocked.quantize(w).dequantize(jnp.float32)))

    gradient = jax.grad(loss)(w)
    monkeypatch.undo()
    np.testing.assert_array_equal(gradient, jax.grad(loss)(w))


def test_a_tree(taken):
    kernel = jnp.asarray(make_weight(normal, (48, 136), F32, 0))
    qparams, report = tree.quantize_tree({"mlp": {"kernel": kernel}})
    expected = numpy_reference.quantize(np.asarray(kernel).T, QuantConfig())
    assert_bytes(qparams["mlp"]["kernel"], *expected)
    assert taken == [((136, 48), F32)]
    assert report.tensors[0].relative_error == pytest.approx(0.026, abs=0.003)


@pytest.mark.parametrize(
    ("shape", "dtype", "block", "message"),
    [
        ((4, 16), BF16, 64, "block_size is (64, 64); the kernel takes (128, 128)"),
        ((4, 24), BF16, 128, "K is 24; the kernel takes multiples of 16"),
        ((0, 16), BF16, 128, "the weight is empty ([0, 16]); the kernel takes others"),
    ],
)
def test_what_the_kernel_does_not_take_is_for_xla(taken, shape, dtype, block, message):
    w, config = jnp.ones(shape, dtype), QuantConfig(weight_block_size=block)
    with pytest.raises(NotImplementedError) as caught:
        blocked.quantize(w, config, implementation="mosaic_gpu")
    assert str(caught.value) == f"mosaic_gpu: {message}"
    assert blocked.quantize(w, config).shape == shape
    assert not taken


def test_either_implementation_can_be_forced(taken):
    w = jnp.asarray(make_weight(normal, (16, 48), BF16, 0))
    by_xla = blocked.quantize(w, implementation="xla")
    assert not taken
    by_kernel = blocked.quantize(w, implementation="mosaic_gpu")
    assert taken
    assert_bytes(by_kernel, np.asarray(by_xla.qvalue), np.asarray(by_xla.scale))
