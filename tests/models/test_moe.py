"""Routing and experts as pure functions, against numpy written from the papers' formulas."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.models import moe
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.moe import Routing, apply_experts, read_routing

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


def test_experts_of_each_token_are_added_up_by_weight():
    K = 5
    x, w = rng.standard_normal((T, K)), rng.standard_normal((E, K, K))
    weights, experts = Routing(E, 3).choose(jnp.asarray(LOGITS))

    def run(x, rows, places, sizes):
        assert rows.shape == (T * 3,)
        assert np.array_equal(rows[places], np.arange(T)[:, None].repeat(3, 1))
        e = np.repeat(np.arange(E), np.asarray(sizes))
        return jnp.einsum("tk,tnk->tn", x[rows], jnp.asarray(w)[e], precision="highest")

    got = apply_experts(jnp.asarray(x, jnp.float32), weights, experts, E, run)
    want = np.einsum("te,enk,tk->tn", as_dense(weights, experts), w, x)
    assert np.allclose(got, want, atol=1e-5)


def test_a_token_is_dropped_nowhere():
    x = jnp.ones((T, 2))
    experts = jnp.full((T, 1), 7)  # all to one expert
    got = apply_experts(x, jnp.ones((T, 1)), experts, E, lambda x, rows, *_: 3 * x[rows])
    assert np.array_equal(got, 3 * x)


@pytest.mark.parametrize("few", [0, 1000])  # by a sort, and by comparison
@pytest.mark.parametrize("T", [1, 7, 40])
def test_tokens_are_sorted_by_expert(monkeypatch, T, few):
    monkeypatch.setattr(moe, "_FEW", few)
    experts = rng.integers(0, E, (T, 3))
    rows, places, sizes = moe.sorted_by_expert(jnp.asarray(experts, jnp.int32), E)
    assert np.array_equal(sizes, np.bincount(experts.ravel(), minlength=E))
    order = np.argsort(experts.ravel(), kind="stable")
    assert np.array_equal(rows, order // 3)
    assert np.array_equal(places, np.argsort(order).reshape(T, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 5}, "n_group is 5; allowed: a divisor of the number of experts"),
        ({"groups": 2, "top_groups": 3}, "topk_group is 3; allowed: at most n_group"),
        ({"groups": 6, "top_groups": 1}, "num_experts_per_tok is 3; allowed: at most 2 experts"),
        ({"groups": 12, "top_groups": 4, "group_top": 2}, "groups of at least 2 experts"),
    ],
)
def test_routing_that_cannot_be_is_named(options, message):
    fields = {
        "num_experts": E,
        "num_experts_per_tok": 3,
        "n_group": options.get("groups"),
        "topk_group": options.get("top_groups"),
    }
    with pytest.raises(jq.CheckpointError, match=message):
        read_routing(HFConfig(fields), "num_experts", **options)
