"""Whole transformers that other people wrote, installed as they are: `jaxquant[test-models]`.

Each has random weights, a forward that nothing here changes, and conventions of its own: matrices
`[out, in]` of Equinox, stacked and scanned; Flax linen kernels and an einsum over `[2, in, out]`;
named axes, with several dimensions in and out.
"""

from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fp8_checks import BLOCKS, assert_runs_as_fp8

import jaxquant as jq
from jaxquant.transform import fp8

KEY = jax.random.key(0)


def needs(package):
    return pytest.mark.skipif(not find_spec(package), reason=f"needs {package}: [test-models]")


def check(forward, params, *args, skip, rules, matmuls):
    """All that no skip matches runs as FP8 products, and nearly as it did."""
    rules = [jq.Rule(skip, skip=True), *rules]
    qparams, report = jq.quantize_tree(params, BLOCKS, rules)
    unexplained = {t.reason for t in report.kept} - {f"rule {skip}", "0-D", "1-D"}
    assert unexplained <= {"no rule matches"}  # biases
    assert_runs_as_fp8(forward, qparams, *args, matmuls=matmuls)
    y, expected = jax.jit(fp8(forward))(qparams, *args), jax.jit(forward)(params, *args)
    error = float(jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected))
    assert 0.005 < error < 0.15


@needs("esm2quinox")
def test_esm2_in_equinox():
    import equinox as eqx
    import esm2quinox

    model = esm2quinox.ESM2(num_layers=3, embed_size=64, num_heads=4, token_dropout=False, key=KEY)
    arrays, rest = eqx.partition(model, eqx.is_array)

    def forward(arrays, tokens):
        return jax.vmap(eqx.combine(arrays, rest))(tokens).logits

    tokens = esm2quinox.tokenise(["SPIDERMAN", "SPUDMAN"])
    skip = "norm|logit_head/linear2"  # the head is the embedding, too
    check(forward, arrays, tokens, skip=skip, rules=["/weight$"], matmuls=3 * 6 + 1)


@needs("recurrentgemma")
def test_recurrentgemma_in_flax_linen():
    from recurrentgemma import common
    from recurrentgemma.jax import griffin

    recurrent, attention = common.TemporalBlockType.RECURRENT, common.TemporalBlockType.ATTENTION
    config = common.GriffinConfig(
        vocab_size=64,
        width=64,
        mlp_expanded_width=192,
        num_heads=2,
        lru_width=64,
        block_types=(recurrent, recurrent, attention),
        embeddings_scale_by_sqrt_dim=True,
        attention_window_size=16,
        logits_soft_cap=30.0,
        scan_type=common.ScanType.LINEAR_NATIVE,
    )
    model = griffin.Griffin(config)
    tokens, positions = np.arange(16).reshape(2, 8), np.tile(np.arange(8), (2, 1))
    params = jax.jit(model.init)(KEY, tokens, positions)

    def forward(params, tokens, positions):
        return model.apply(params, tokens, positions)[0]

    check(
        forward,
        params,
        tokens,
        positions,
        skip="embed|norm|conv|gate",
        rules=["/kernel$", jq.Rule("ffw_up/w$", contracting=(-2,))],
        matmuls=2 * 5 + 6,
    )


@needs("penzai")
@pytest.mark.parametrize("stacked", [False, True])
def test_llama_in_penzai(stacked):
    from penzai import pz
    from penzai.models.transformer.variants import llamalike_common

    config = llamalike_common.LlamalikeTransformerConfig(
        num_kv_heads=2,
        query_head_multiplier=2,
        embedding_dim=64,
        projection_dim=16,
        mlp_hidden_dim=96,
        num_decoder_blocks=2,
        vocab_size=64,
        mlp_variant="swiglu",
        tie_embedder_and_logits=False,
        use_layer_stack=stacked,
    )
    model = pz.freeze_params(llamalike_common.build_llamalike_transformer(config, KEY))

    def forward(model, tokens):
        tokens = pz.nx.wrap(tokens).tag("batch", "seq")
        logits = model(tokens, token_positions=pz.nx.arange("seq", 8))
        return logits.unwrap("batch", "seq", "vocabulary")

    rules = [
        jq.Rule("input_to_query", contracting=(-4,)),  # [embedding, kv_heads, q_rep, projection]
        jq.Rule("input_to_(key|value)", contracting=(-3,)),  # [embedding, kv_heads, projection]
        jq.Rule("attn_value_to_output", contracting=(-4, -3, -2)),
        jq.Rule("delta/sublayers/1/sublayers/", contracting=(-2,)),  # the MLP
    ]
    skip = r"^body/sublayers/\d/(table|weights|sublayers/1/weights)|delta/sublayers/0/"
    check(forward, model, np.arange(16).reshape(2, 8), skip=skip, rules=rules, matmuls=2 * 7)
