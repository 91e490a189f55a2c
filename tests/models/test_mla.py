"""Latent attention: the expanded and the absorbed form are the same function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.models.attention import DecodeStep, Prefill
from jaxquant.models.dense import LayerKind
from jaxquant.models.layers import Rope, Stack
from jaxquant.models.mla import MLA, MLAConfig, absorbed_attention, expanded_attention

B, T, H, DN, DR, DV, R = 2, 9, 3, 24, 16, 20, 40
SCALE = 0.21
rng = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def by_hand(q_nope, q_rope, latents, k_rope, kv_b):
    """Of the last token."""
    kv = np.einsum("bsr,hdr->bshd", latents, kv_b)
    logits = np.einsum("bhd,bshd->bhs", q_nope[:, -1], kv[..., :DN])
    logits = SCALE * (logits + np.einsum("bhd,bsd->bhs", q_rope[:, -1], k_rope))
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhs,bshd->bhd", p / p.sum(-1, keepdims=True), kv[..., DN:])


def test_both_forms_are_attention_by_hand():
    q_nope, q_rope = normal(B, T, H, DN), normal(B, T, H, DR)
    latents, k_rope, kv_b = normal(B, T, R), normal(B, T, DR), normal(H, DN + DV, R) * 0.2
    want = by_hand(q_nope, q_rope, latents, k_rope, kv_b)
    kv = jnp.einsum("bsr,hdr->bshd", latents, kv_b)
    expanded = expanded_attention(q_nope, q_rope, kv, k_rope, SCALE)
    padded = jnp.pad(latents, ((0, 0), (0, 3), (0, 0))), jnp.pad(k_rope, ((0, 0), (0, 3), (0, 0)))
    absorbed = absorbed_attention(
        q_nope[:, -1:], q_rope[:, -1:], *padded, kv_b, jnp.full(B, T), SCALE
    )
    assert np.allclose(expanded[:, -1], want, atol=1e-5)
    assert np.allclose(absorbed[:, 0], want, atol=1e-5)


def test_the_absorbed_form_in_bfloat16():
    q_nope, q_rope, kv_b = normal(B, 1, H, DN), normal(B, 1, H, DR), normal(H, DN + DV, R) * 0.2
    args = q_nope, q_rope, normal(B, T, R), normal(B, T, DR), kv_b
    rounded = [x.astype(jnp.bfloat16) for x in args]
    attend = jax.jit(lambda *args: absorbed_attention(*args, jnp.full(B, T), SCALE))
    got, want = attend(*rounded), by_hand(*(np.asarray(x, np.float32) for x in rounded))
    assert got.dtype == jnp.bfloat16
    assert np.linalg.norm(got[:, 0] - want) < 0.01 * np.linalg.norm(want)


def test_values_wider_than_keys():
    wide = DN + DR + 12
    q_nope, q_rope, kv = normal(B, T, H, DN), normal(B, T, H, DR), normal(B, T, H, DN + wide)
    got = expanded_attention(q_nope, q_rope, kv, normal(B, T, DR), SCALE)
    assert got.shape == (B, T, H, wide)
    assert np.allclose(got[:, 0], kv[:, 0, :, DN:], atol=1e-5)  # the first token sees itself


@pytest.mark.parametrize(
    ("scheme", "q_rank", "tolerance"),
    [("plain", None, 1e-5), ("weight-only", 28, 1e-5), ("dynamic", 28, 0.06)],
)
def test_a_decode_step_is_the_last_token_of_a_prefill(q_rank, scheme, tolerance):
    # With FP8 activations the two differ by the rounding of what kv_b_proj is multiplied with.
    cfg = MLAConfig(
        hidden_size=48,
        num_heads=H,
        q_rank=q_rank,
        kv_rank=R,
        nope_dim=DN,
        rope_dim=DR,
        v_dim=DV,
        scale=SCALE,
    )
    module = MLA(cfg, Stack(range(2)), jnp.float32)
    config = jq.QuantConfig(
        weight_block_size=(32, 32), activation_scheme="dynamic" if scheme == "dynamic" else None
    )

    def fill(leaf):
        w = normal(*leaf.shape) * leaf.shape[-1] ** -0.5
        return w if scheme == "plain" or w.ndim < 3 else jq.quantize(w, config)

    module = jax.tree.map(fill, module)
    rope = Rope(DR, 10000.0, interleaved=True)
    kind, x, ids = (
        LayerKind(rope),
        normal(B, T, 48),
        jnp.zeros((B, T), int),
    )

    @functools.partial(jax.jit, static_argnums=0)
    def prefill(n):
        cache = cfg.empty_cache(2, B, T, x.dtype)
        return module(x[:, :n], 1, Prefill.of(ids[:, :n], [rope], jnp.full(B, n)), cache, 1, kind)

    @jax.jit
    def decode(cache):
        return module(x[:, -1:], 1, DecodeStep.of(jnp.full(B, T - 1), [rope]), cache, 1, kind)

    (whole, _), (short, cache) = prefill(T), prefill(T - 1)
    step, _ = decode(cache)
    assert np.allclose(short, whole[:, :-1], atol=1e-5)
    error = np.linalg.norm(step[:, 0] - whole[:, -1]) / np.linalg.norm(whole[:, -1])
    assert error < tolerance
    assert (scheme != "dynamic") or error > 1e-4
