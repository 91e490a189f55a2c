"""Experts as pure functions, and routing as it is read from a config."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.matmul.routing import Routing, sorted_by_expert
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.moe import apply_experts, read_routing

T, E = 40, 12
rng = np.random.default_rng(0)
LOGITS = rng.standard_normal((T, E)).astype(np.float32) * 2


def as_dense(weights, experts):
    """[T, E] with each chosen expert's weight; the order of the chosen ones means nothing."""
    dense = np.zeros((T, E), np.float32)
    np.put_along_axis(dense, np.asarray(experts), np.asarray(weights), axis=-1)
    return dense


def test_experts_of_each_token_are_added_up_by_weight():
    K = 5
    x, w = rng.standard_normal((T, K)), rng.standard_normal((E, K, K))
    weights, experts = Routing(E, 3).choose(jnp.asarray(LOGITS))
    routed = weights, *sorted_by_expert(experts, E)

    def run(x, rows, places, sizes):
        assert rows.shape == (T * 3,)
        assert np.array_equal(rows[places], np.arange(T)[:, None].repeat(3, 1))
        e = np.repeat(np.arange(E), np.asarray(sizes))
        return jnp.einsum("tk,tnk->tn", x[rows], jnp.asarray(w)[e], precision="highest")

    got = apply_experts(jnp.asarray(x, jnp.float32), *routed, run)
    want = np.einsum("te,enk,tk->tn", as_dense(weights, experts), w, x)
    assert np.allclose(got, want, atol=1e-5)


def test_a_token_is_dropped_nowhere():
    x = jnp.ones((T, 2))
    experts = jnp.full((T, 1), 7)  # all to one expert
    routed = sorted_by_expert(experts, E)
    got = apply_experts(x, jnp.ones((T, 1)), *routed, lambda x, rows, *_: 3 * x[rows])
    assert np.array_equal(got, 3 * x)


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
