"""grouped_matmul: rows of experts, each as jaxquant.matmul has it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

import jaxquant as jq
from jaxquant.matmul.grouped import grouped_matmul

N, K = 200, 300  # edge blocks on both sides
rng = np.random.default_rng(0)


@functools.cache
def experts(kind, lead):
    w = rng.standard_normal((*lead, N, K)).astype(np.float32)
    if kind == "plain":
        return jnp.asarray(w)
    qa = jq.quantize(jnp.asarray(w))
    return dataclasses.replace(qa, activation_scheme="dynamic" if kind == "w8a8" else None)


def expected(x, w, sizes):
    rows = np.repeat(np.arange(len(sizes)), sizes)
    each = [jq.matmul(x, jax.tree.map(lambda leaf, e=e: leaf[e], w)) for e in range(len(sizes))]
    return np.stack([np.asarray(each[e][row]) for row, e in enumerate(rows)])


@pytest.mark.parametrize("kind", ["plain", "w8a8", "w8a16"])
@pytest.mark.parametrize(
    "sizes", [[1, 0, 0, 0], [0, 0, 0, 5], [2, 3, 1, 4], [0, 150, 0, 23], [33, 1, 64, 7]]
)
def test_each_row_is_the_matmul_of_its_group(kind, sizes):
    x, w = jnp.asarray(rng.standard_normal((sum(sizes), K), np.float32)), experts(kind, (4,))
    y = jax.jit(grouped_matmul)(x, w, jnp.asarray(sizes, jnp.int32))
    assert np.allclose(y, expected(x, w, sizes), rtol=1e-5, atol=2e-4)


@given(st.lists(st.integers(0, 9), min_size=4, max_size=4))
def test_groups_of_any_sizes(sizes):
    T = 24  # one shape, compiled once; the sum may be less, and then the rest is zero
    sizes = np.minimum(sizes, T - np.minimum(T, np.cumsum([0, *sizes[:-1]])))
    x, w = jnp.asarray(rng.standard_normal((T, K), np.float32)), experts("plain", (4,))
    y = np.asarray(jitted(x, w, jnp.asarray(sizes, jnp.int32)))
    total = int(sizes.sum())
    assert not y[total:].any()
    if total:
        assert np.allclose(y[:total], expected(x, w, sizes), rtol=1e-5, atol=2e-4)


jitted = jax.jit(grouped_matmul)


@pytest.mark.parametrize("kind", ["plain", "w8a8"])
def test_a_stack_with_a_traced_layer(kind):
    sizes, w = jnp.asarray([2, 0, 1, 3], jnp.int32), experts(kind, (2, 4))
    x = jnp.asarray(rng.standard_normal((6, K), np.float32))
    run = jax.jit(lambda l: grouped_matmul(x, w, sizes, layer=l))
    for layer in range(2):
        alone = grouped_matmul(x, jax.tree.map(lambda leaf, l=layer: leaf[l], w), sizes)
        assert np.allclose(run(layer), alone, rtol=1e-5, atol=2e-4)


def test_the_results_dtype_is_the_inputs_or_as_asked():
    x, sizes = jnp.ones((3, K), jnp.bfloat16), jnp.asarray([3, 0, 0, 0], jnp.int32)
    run = functools.partial(grouped_matmul, x, experts("w8a8", (4,)), sizes)
    assert run().dtype == jnp.bfloat16
    assert run(preferred_element_type=jnp.float32).dtype == jnp.float32
    assert grouped_matmul(x[:0], experts("plain", (4,)), sizes * 0).shape == (0, N)


def test_a_transposed_weight_is_stored_alike():
    x, sizes = jnp.ones((3, K)), jnp.asarray([1, 0, 2, 0], jnp.int32)
    w = experts("w8a8", (4,))
    transposed = dataclasses.replace(w, transposed=True)
    assert np.array_equal(grouped_matmul(x, transposed, sizes), grouped_matmul(x, w, sizes))


def test_a_step_over_layers_copies_no_experts():
    L, E = 3, 16
    shape = jax.eval_shape(lambda: jq.quantize(jnp.zeros((L, E, 256, 256))))

    def step(x, w, sizes):
        def layer(x, l):
            return grouped_matmul(x, w, sizes, layer=l), None

        return jax.lax.scan(layer, x, jnp.arange(L))[0]

    x, sizes = jax.ShapeDtypeStruct((1, 256), jnp.float32), jax.ShapeDtypeStruct((E,), jnp.int32)
    memory = jax.jit(step).lower(x, shape, sizes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < shape.qvalue.size / 4  # a few matrices of float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((3, 4), jnp.int32)}, "x has dtype int32; allowed: a floating dtype"),
        ({"x": jnp.ones((3, 5))}, r"x \[3, 5\] does not fit w stored as \[2, 6, 4\]"),
        ({"x": jnp.ones((1, 3, 4))}, r"x \[1, 3, 4\] does not fit"),
        ({"w": jnp.ones((6, 4))}, r"w is stored as \[6, 4\]; allowed: \[E, N, K\]"),
        ({"layer": 0}, r"w is stored as \[2, 6, 4\]; allowed: \[L, E, N, K\]"),
        ({"group_sizes": jnp.ones(3, jnp.int32)}, "one integer for each of the 2 matrices"),
        ({"group_sizes": jnp.ones(2)}, "group_sizes is float32"),
        ({"places": jnp.ones((3, 2), jnp.int32)}, r"places is \[3, 2\] for 0 rows of 3 tokens"),
        ({"implementation": "fast"}, "implementation is 'fast'; allowed: mosaic_gpu, xla"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_operands_are_named(change, message):
    good = {"x": jnp.ones((3, 4)), "w": jnp.ones((2, 6, 4))}
    call = {**good, "group_sizes": jnp.asarray([1, 2], jnp.int32), **change}
    with pytest.raises(jq.JaxquantError, match=message):
        grouped_matmul(**call)
