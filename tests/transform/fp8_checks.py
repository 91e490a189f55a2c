"""Trees of quantized weights, and what `fp8` has to give for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant.transform import Fp8Report, fp8, fp8_report

BLOCKS = jq.QuantConfig(weight_block_size=(16, 32))


def is_quantized(x):
    return isinstance(x, jq.QuantizedArray)


@functools.cache
def kernel(*shape, seed=0, dtype=jnp.float32, config=BLOCKS):
    """A quantized `[..., in, out]`."""
    w = jax.random.normal(jax.random.key(seed), shape, dtype)
    return jq.quantize_tree({"kernel": w}, config, rules=["kernel"])[0]["kernel"]


@functools.cache
def contracting(dims, *shape, seed=0):
    """A quantized array of which products contract these dimensions, counted from the end."""
    w = jax.random.normal(jax.random.key(seed), shape)
    return jq.quantize_tree([w], BLOCKS, rules=[jq.Rule("", contracting=dims)])[0][0]


@functools.cache
def normal(*shape, seed=7, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def dequantized(tree):
    """The tree as the function knows it."""
    return jax.tree.map(
        lambda x: x.dequantize() if is_quantized(x) else x, tree, is_leaf=is_quantized
    )


def assert_close(actual, expected, tolerance=1e-5):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        a, e = np.asarray(a, np.float32), np.asarray(e, np.float32)
        np.testing.assert_allclose(a, e, atol=tolerance * max(np.abs(e).max(), 1), rtol=0)


def assert_each_runs_as_fp8(cases, *args):
    """assert_runs_as_fp8 of several functions of the same arguments, compiled as one program."""

    def all_of(*args):
        return {name: fn(*args) for name, fn in cases.items()}

    expected = jax.jit(all_of)(*dequantized(args))
    actual = jax.jit(fp8(all_of, weight_only=True))(*args)
    for name in cases:
        try:
            assert_close(actual[name], expected[name])
        except AssertionError as e:
            raise AssertionError(name) from e


def assert_runs_as_fp8(fn, *args, matmuls=None, dequantized_leaves=0, op_by_op=False) -> Fp8Report:
    """fn on quantized arguments gives what it gives on dequantized ones, by FP8 products.

    Weight-only, so that the results differ by rounding in float32 alone.
    """
    expected = jax.jit(fn)(*dequantized(args))
    run = fp8(fn, weight_only=True)
    assert_close((run if op_by_op else jax.jit(run))(*args), expected)
    report = fp8_report(fn, *args)
    assert len(report.dequantized) == dequantized_leaves, str(report)
    if not dequantized_leaves:
        assert not report.idle, str(report)
    if matmuls is not None:
        assert sum(leaf.matmuls for leaf in report.leaves) == matmuls, str(report)
    return report
