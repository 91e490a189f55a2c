"""The families with experts against transformers, and against themselves: cache, layouts, FP8."""

import dataclasses
import json
import re

import builders
import jax
import jax.numpy as jnp
import moe_checkpoints
import numpy as np
import pytest
from jax import lax
from moe_checkpoints import BLOCK, CASES, GOLDEN, expected, is_projection, variant

import jaxquant as jq
from jaxquant.array import QuantizedArray
from jaxquant.checkpoint.folder import CheckpointFolder
from jaxquant.checkpoint.plan import make_plan
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.registry import Family

CONFIG = jq.QuantConfig(weight_block_size=BLOCK)
TOLERANCE = 1e-4


def relative(x, reference):
    x, reference = np.asarray(x, np.float32), np.asarray(reference, np.float32)
    return np.linalg.norm(x - reference) / np.linalg.norm(reference)


@pytest.fixture(scope="module")
def golden():
    """case -> the model in float32, loaded once."""
    models = {}

    def load(case):
        if case not in models:
            models[case] = jq.from_pretrained(GOLDEN / case, dtype=jnp.float32)
        return models[case]

    return load


def leaves(model):
    return jax.tree.leaves(model.module, is_leaf=lambda x: isinstance(x, QuantizedArray))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_transformers(golden, case):
    logits = golden(case)(expected(case)["tokens"])
    assert logits.dtype == jnp.float32
    assert relative(logits, expected(case)["logits"]) < TOLERANCE


prefill = jax.jit(lambda module, *args: module.prefill(*args))
decode = jax.jit(lambda module, *args: module.decode(*args))


@pytest.mark.parametrize("case", CASES)
def test_prefill_and_decode_equal_the_full_forward(golden, monkeypatch, case):
    module, tokens = golden(case).module, expected(case)["tokens"]
    full = golden(case)(tokens)
    lengths = np.array([7, 11], np.int32)  # the padding behind is other tokens, and ignored
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(lax, "empty", builders.full_of_nan)
    cache = module.empty_cache(2, 20, awaited=tokens.shape[1])
    logits, cache = prefill(module, jnp.asarray(tokens), jnp.asarray(lengths), cache)
    assert relative(logits, full[np.arange(2), lengths - 1]) < TOLERANCE
    for step in range(4):
        at = lengths + step
        logits, cache = decode(module, jnp.asarray(tokens[np.arange(2), at]), cache)
        assert relative(logits, full[np.arange(2), at]) < TOLERANCE
    assert np.array_equal(cache.lengths, lengths + 4)


def test_latents_in_fp8_are_close(golden):
    module, tokens = golden("deepseek_v3").module, expected("deepseek_v3")["tokens"]
    lengths, cache = np.array([7, 11], np.int32), module.empty_cache(2, 20, "float8_e4m3fn")
    _, cache = prefill(module, jnp.asarray(tokens), jnp.asarray(lengths), cache)
    logits, _ = decode(module, jnp.asarray(tokens[np.arange(2), lengths]), cache)
    full = golden("deepseek_v3")(tokens)[np.arange(2), lengths]
    assert 1e-3 < relative(logits, full) < 0.1


def test_latent_attention_in_fp8_is_close(golden):
    model, tokens = golden("deepseek_v3"), expected("deepseek_v3")["tokens"]
    logits = jax.jit(lambda module: module(jnp.asarray(tokens), "float8_e4m3fn"))(model.module)
    assert 5e-3 < relative(logits, model(tokens)) < 0.4


def test_the_cache_of_latent_attention_holds_latents(golden):
    cache = golden("deepseek_v3").module.empty_cache(2, 20)
    assert (cache.k.shape, cache.v.shape) == ((3, 2, 1, 20, 40), (3, 2, 1, 20, 16))


@pytest.mark.parametrize("case", ["mixtral", "deepseek_v3"])
def test_fp8_is_the_model_of_the_dequantized_weights(golden, tmp_path, case):
    def dequantized(tensors):
        for name, w in tensors.items():
            if is_projection(name):
                q, scale = moe_checkpoints.quantize(w.astype(np.float32))
                tensors[name] = q.astype(np.float32) * moe_checkpoints.expand(scale, w.shape)
        return tensors

    tokens = expected(case)["tokens"]
    plain = jq.from_pretrained(variant(case, tmp_path, dequantized), dtype=jnp.float32)
    weight_only = dataclasses.replace(CONFIG, activation_scheme=None)
    fp8 = jq.from_pretrained(GOLDEN / case, weight_only, dtype=jnp.float32)
    assert relative(fp8(tokens), plain(tokens)) < TOLERANCE
    # A router's choice may turn, so what is near in weights need not be in logits.
    assert 1e-3 < relative(fp8(tokens), expected(case)["logits"]) < 0.6


def test_fp8_activations_are_another_thing_still(golden):
    tokens = expected("qwen2_moe")["tokens"]
    fp8 = jq.from_pretrained(GOLDEN / "qwen2_moe", CONFIG, dtype=jnp.float32)
    assert 1e-3 < relative(fp8(tokens), golden("qwen2_moe")(tokens)) < 0.4


ATTENTION = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
LATENT = {"self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj", "self_attn.o_proj"}
LORA = {"self_attn.q_a_proj", "self_attn.q_b_proj"}
DENSE = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
EXPERTS = {"mlp.experts.*.gate_proj", "mlp.experts.*.up_proj", "mlp.experts.*.down_proj"}
SHARED = {name.replace("mlp.", "mlp.shared_experts.") for name in DENSE}
NORMS = {"input_layernorm", "post_attention_layernorm"}
EVER_KEPT = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
SELECTED = {
    "mixtral": (
        ATTENTION | {f"block_sparse_moe.experts.*.{w}" for w in ("w1", "w2", "w3")},
        NORMS | {"block_sparse_moe.gate"},
    ),
    "qwen2_moe": (
        ATTENTION | DENSE | EXPERTS | {n.replace("experts", "expert") for n in SHARED},
        NORMS | {"mlp.gate", "mlp.shared_expert_gate"},
    ),
    "qwen3_moe": (
        ATTENTION | DENSE | EXPERTS,
        NORMS | {"mlp.gate", "self_attn.q_norm", "self_attn.k_norm"},
    ),
    "deepseek_v2": (
        LATENT | LORA | DENSE | EXPERTS | SHARED,
        NORMS | {"mlp.gate", "self_attn.q_a_layernorm", "self_attn.kv_a_layernorm"},
    ),
    "deepseek_v2_lite": (
        LATENT | {"self_attn.q_proj"} | DENSE | EXPERTS | SHARED,
        NORMS | {"mlp.gate", "self_attn.kv_a_layernorm"},
    ),
    "deepseek_v3": (
        LATENT | LORA | DENSE | EXPERTS | SHARED,
        NORMS | {"mlp.gate", "self_attn.q_a_layernorm", "self_attn.kv_a_layernorm"},
    ),
    "glm4_moe": (
        ATTENTION | DENSE | EXPERTS | SHARED,
        NORMS | {"mlp.gate", "self_attn.q_norm", "self_attn.k_norm"},
    ),
}
OTHER_KEPT = {
    "qwen2_moe": {f"model.layers.*.self_attn.{p}_proj.bias" for p in "qkv"},
    "qwen3_moe": {"lm_head.weight"},  # tied: there is none
    "deepseek_v3": {"model.layers.*.mlp.gate.e_score_correction_bias"},
    "glm4_moe": {
        "model.layers.*.mlp.gate.e_score_correction_bias",
        *(f"model.layers.*.self_attn.{p}_proj.bias" for p in "qkv"),
    },
}


@pytest.mark.parametrize("case", CASES)
def test_what_becomes_fp8_and_what_stays(case):
    found = {True: set(), False: set()}
    with CheckpointFolder(GOLDEN / case) as folder:
        for item in make_plan(folder, CONFIG).items:
            name = re.sub(r"(?<=\.)\d+(?=\.)", "*", item.name)
            found[item.config is not None].add(name)
    quantized, kept = (
        {f"model.layers.*.{module}.weight" for module in modules} for modules in SELECTED[case]
    )
    assert found[True] == quantized
    assert found[False] == (kept | EVER_KEPT) ^ OTHER_KEPT.get(case, set())


def test_a_correction_bias_stays_in_float32(tmp_path):
    def precise(tensors):
        name = "model.layers.1.mlp.gate.e_score_correction_bias"
        return {**tensors, name: np.float32([1 + 2**-20, *range(7)])}

    model = jq.from_pretrained(variant("deepseek_v3", tmp_path, precise))
    bias = model.module.layers[1].mlp.gate.e_score_correction_bias.get_value()
    assert bias.dtype == jnp.float32
    assert bias[0, 0] == np.float32(1 + 2**-20)


# Layouts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("config", [None, CONFIG], ids=["bf16", "fp8"])
def test_stacked_experts_load_to_the_same_bytes(tmp_path, case, config):
    variant(case, tmp_path, moe_checkpoints.stacked)
    alone, together = (jq.from_pretrained(path, config) for path in (GOLDEN / case, tmp_path))
    for a, b in zip(leaves(alone), leaves(together), strict=True):
        assert jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))
    assert [t.path for t in alone.report.tensors] == [t.path for t in together.report.tensors]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w[:4], r"has shape \[4, 72, 48\]; config.json asks for 6 experts"),
        (
            lambda w: w[:, :70],
            r"has shape \[6, 70, 48\]; config.json asks for 72 rows, of gate_proj",
        ),
        (lambda w: w[0], r"has shape \[72, 48\]; config.json asks for 6 experts"),
        (lambda w: w[:, :, :40].copy(), r"has shape \[36, 40\]; config.json asks for \[36, 48\]"),
    ],
)
def test_stacked_experts_of_another_shape_are_refused(tmp_path, change, message):
    def changed(tensors):
        tensors = moe_checkpoints.stacked(tensors)
        name = "model.layers.0.mlp.experts.gate_up_proj"
        return {**tensors, name: np.ascontiguousarray(change(tensors[name]))}

    variant("qwen3_moe", tmp_path, changed)
    with pytest.raises(jq.CheckpointError, match=message):
        jq.from_pretrained(tmp_path)


def with_mtp(tensors):
    """The last layer again, behind itself, with what multi-token prediction adds to it."""
    last = {n: w for n, w in tensors.items() if n.startswith("model.layers.2.")}
    extra = {n.replace(".2.", ".3.", 1): w for n, w in last.items()}
    for name in ("eh_proj", "enorm", "hnorm", "embed_tokens", "shared_head.head"):
        extra[f"model.layers.3.{name}.weight"] = np.ones((3, 4), builders.BF16)
    return {**tensors, **extra}


@pytest.mark.parametrize("case", ["deepseek_v3", "glm4_moe"])
def test_multi_token_prediction_is_left_out_and_reported(tmp_path, case):
    folder = variant(case, tmp_path, with_mtp, num_nextn_predict_layers=1)
    model = jq.from_pretrained(folder, dtype=jnp.float32)
    skipped = {t.path for t in model.report.tensors if "multi-token prediction" in t.reason}
    assert "model/layers/3/eh_proj/weight" in skipped
    assert all(path.startswith("model/layers/3/") for path in skipped)
    tokens = expected(case)["tokens"]
    assert relative(model(tokens), expected(case)["logits"]) < TOLERANCE
    saved = model.save_pretrained(tmp_path / "saved")
    assert json.loads((saved / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert not any(name.startswith("model.layers.3.") for name in builders.load(saved))


def test_further_layers_that_are_not_announced_are_refused(tmp_path):
    folder = variant("deepseek_v3", tmp_path, with_mtp)
    with pytest.raises(jq.CheckpointError, match=r"does not have: model\.layers\.3\."):
        jq.from_pretrained(folder)


def test_an_export_has_each_expert_under_its_own_name(tmp_path):
    case = "mixtral"
    jq.quantize_checkpoint(GOLDEN / case, tmp_path / "streamed", CONFIG)
    model = jq.from_pretrained(GOLDEN / case, CONFIG)
    model.save_pretrained(tmp_path / "saved")
    written = builders.load(tmp_path / "streamed")
    bias = {name for name in written if name.endswith("bias")}  # in float32 once it is loaded
    for name, tensor in builders.load(tmp_path / "saved").items():
        assert name in bias or tensor == written[name]
    original = builders.load(GOLDEN / case).keys()
    scales = {name + "_scale_inv" for name in original if is_projection(name)}
    assert written.keys() == original | scales
    fields = json.loads((tmp_path / "streamed" / "config.json").read_text())
    kept = fields["quantization_config"]["modules_to_not_convert"]
    gates = {name.removesuffix(".weight") for name in original if name.endswith("gate.weight")}
    assert set(kept) == gates | {"lm_head"}
    again = jq.from_pretrained(tmp_path / "streamed")
    for a, b in zip(leaves(model), leaves(again), strict=True):
        assert jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))


@pytest.mark.parametrize(
    "kept", ["model.layers.0.mlp.experts.3", "model.layers.2.mlp.experts.0.up_proj"]
)
def test_some_experts_of_a_layer_cannot_be_kept(kept):
    config = dataclasses.replace(CONFIG, modules_to_not_convert=(kept,))
    with (
        CheckpointFolder(GOLDEN / "qwen3_moe") as folder,
        pytest.raises(jq.CheckpointError, match="allowed: all experts of a layer, or none") as info,
    ):
        make_plan(folder, config)
    assert kept in str(info.value)


def test_all_experts_of_a_layer_can_be_kept():
    config = dataclasses.replace(CONFIG, modules_to_not_convert=("layers.0.mlp.experts",))
    model = jq.from_pretrained(GOLDEN / "qwen3_moe", config)
    kept = {t.path for t in model.report.kept if "experts" in t.path}
    assert len(kept) == 18
    assert [stack.layers for stack in model.module.stacks] == [range(i, i + 1) for i in range(3)]


# Configs ------------------------------------------------------------------------------------------


def family(case, **changes):
    fields = json.loads((GOLDEN / case / "config.json").read_text())
    return Family(HFConfig({k: v for k, v in {**fields, **changes}.items() if v is not ...}))


@pytest.mark.parametrize(
    ("case", "changes", "named"),
    [
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("mixtral", {"num_experts_per_tok": 7}, "num_experts_per_tok is 7; allowed: at most 6"),
        ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen2_moe", {"mlp_only_layers": "all"}, "mlp_only_layers is 'all'; allowed: null or"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("qwen3_moe", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True; allowed: False"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
        ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq is 2; allowed: 1"),
        ("deepseek_v2", {"num_key_value_heads": 1}, "num_key_value_heads is 1; allowed: 3"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ("deepseek_v3", {"n_group": 3}, "n_group is 3; allowed: a divisor"),
        ("glm4_moe", {"topk_group": 2}, "topk_group is 2; allowed: at most n_group (1)"),
        ("deepseek_v3", {"num_hidden_layers": 10**18}, "num_hidden_layers is 1000000000000000000"),
        ("deepseek_v3", {"n_routed_experts": 10**18}, "n_routed_experts is 1000000000000000000"),
        ("qwen3_moe", {"num_local_experts": 10**18}, "num_local_experts is 1000000000000000000"),
        ("glm4_moe", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_a_variant_that_is_not_computed_is_refused_by_name(case, changes, named):
    with pytest.raises(jq.CheckpointError, match=re.escape(named)):
        family(case, **changes)


YARN = {
    "type": "yarn",
    "factor": 4.0,
    "beta_fast": 4,
    "beta_slow": 1,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        (
            "deepseek_v3",
            {
                "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
                "topk_method": "noaux_tc",
                "scoring_func": "sigmoid",
                "moe_layer_freq": 1,
                "ep_size": 1,
                "rope_interleave": ...,
                "head_dim": ...,
            },
        ),
        (
            "deepseek_v2_lite",
            {
                "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
                "n_group": 1,
                "topk_group": 1,
                "scoring_func": "softmax",
                "aux_loss_alpha": 0.001,
                "head_dim": ...,
            },
        ),
        ("glm4_moe", {"partial_rotary_factor": 0.5}),
        ("qwen3_moe", {"rope_theta": 1000000.0, "num_experts": 6, "num_local_experts": ...}),
        ("qwen2_moe", {"layer_types": ..., "mlp_only_layers": ..., "qkv_bias": ...}),
        ("mixtral", {"sliding_window": None}),
    ],
)
def test_configs_as_published_mean_the_same(case, changes):
    old = {"rope_parameters": ..., "rope_theta": 10000.0, "rope_scaling": None, **changes}
    assert family(case, **old).cfg == family(case).cfg


def test_layers_without_experts_are_stacks_of_their_own():
    assert family("qwen2_moe").cfg.is_sparse == (False, True, False, True)
    assert family("qwen3_moe").cfg.is_sparse == (True, False, True)
    stacks = family("deepseek_v3", num_hidden_layers=9, first_k_dense_replace=3)
    model = stacks.abstract_model(jnp.float32)
    assert [stack.layers for stack in model.stacks] == [range(3), range(3, 9)]
    assert not family("deepseek_v3", n_shared_experts=None).cfg.shared_size
