"""Which experts tokens go to, against numpy written from the papers' formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.matmul import Routing, route, routing as module

T, E = 40, 12
rng = np.random.default_rng(0)
LOGITS = rng.standard_normal((T, E)).astype(np.float32) * 2


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def as_dense(weights, experts):
    """[T, E] with each chosen expert's weight; the order of the chosen ones means nothing."""
    dense = np.zeros((T, E), np.float32)
    np.put_along_axis(dense, np.asarray(experts), np.asarray(weights), axis=-1)
    return dense


def top(x, k):
    """A mask of the k largest of each row."""
    mask = np.zeros(x.shape, bool)
    np.put_along_axis(mask, np.argsort(-x, axis=-1)[..., :k], True, axis=-1)
    return mask


def test_softmax_then_the_best():
    weights, experts = Routing(E, 3, normalize=False).choose(jnp.asarray(LOGITS))
    assert weights.dtype == jnp.float32
    want = np.where(top(LOGITS, 3), softmax(LOGITS), 0)
    assert np.allclose(as_dense(weights, experts), want, atol=1e-6)


def test_normalized_it_is_the_best_then_softmax():
    weights, experts = Routing(E, 3).choose(jnp.asarray(LOGITS))
    want = softmax(np.where(top(LOGITS, 3), LOGITS, -np.inf))
    assert np.allclose(as_dense(weights, experts), want, atol=1e-6)


def test_the_best_groups_by_their_best_expert():
    routing = Routing(E, 3, normalize=False, scale=16.0, groups=4, top_groups=2)
    scores = softmax(LOGITS)
    groups = top(scores.reshape(T, 4, 3).max(-1), 2).repeat(3, axis=-1)
    want = 16 * np.where(top(np.where(groups, scores, 0), 3), scores, 0)
    assert np.allclose(as_dense(*routing.choose(jnp.asarray(LOGITS))), want, atol=1e-5)


def test_sigmoid_with_a_bias_for_the_choice_alone():
    routing = Routing(E, 3, score="sigmoid", scale=2.5, groups=4, top_groups=2, group_top=2)
    bias = rng.standard_normal(E).astype(np.float32) * 0.3
    scores = 1 / (1 + np.exp(-LOGITS))
    merit = scores + bias
    worth = np.sort(merit.reshape(T, 4, 3), axis=-1)[..., 1:].sum(-1)
    chosen = top(np.where(top(worth, 2).repeat(3, axis=-1), merit, -np.inf), 3)
    assert (chosen != top(scores, 3)).any()
    want = np.where(chosen, scores, 0)
    want *= 2.5 / want.sum(-1, keepdims=True)
    got = as_dense(*routing.choose(jnp.asarray(LOGITS), jnp.asarray(bias)))
    assert np.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("few", [0, 1000])  # by a sort, and by comparison
@pytest.mark.parametrize("T", [1, 7, 40])
def test_tokens_are_sorted_by_expert(monkeypatch, T, few):
    monkeypatch.setattr(module, "_FEW", few)
    experts = rng.integers(0, E, (T, 3))
    rows, places, sizes = module.sorted_by_expert(jnp.asarray(experts, jnp.int32), E)
    assert np.array_equal(sizes, np.bincount(experts.ravel(), minlength=E))
    order = np.argsort(experts.ravel(), kind="stable")
    assert np.array_equal(rows, order // 3)
    assert np.array_equal(places, np.argsort(order).reshape(T, 3))


@pytest.mark.parametrize("options", [{}, {"score": "sigmoid", "groups": 4, "top_groups": 2}])
def test_a_route_is_the_choice_and_the_tokens_sorted_by_it(options):
    routing = Routing(E, 3, **options)
    weights, experts = routing.choose(jnp.asarray(LOGITS))
    want = weights, *module.sorted_by_expert(experts, E)
    for got, of in zip(route(routing, jnp.asarray(LOGITS)), want, strict=True):
        assert np.array_equal(got, of)


def test_a_route_is_differentiated_as_the_choice():
    routing, x = Routing(E, 3), jnp.asarray(LOGITS)
    got = jax.grad(lambda x: jnp.sum(jnp.square(route(routing, x)[0])))(x)
    want = jax.grad(lambda x: jnp.sum(jnp.square(routing.choose(x)[0])))(x)
    assert np.allclose(got, want)
    assert np.any(got)
