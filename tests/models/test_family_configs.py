"""What config.json of each dense family may say: defaults, older forms, and what is refused."""

import json
from pathlib import Path

import jax
import pytest

from jaxquant.errors import CheckpointError
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.registry import Family

GOLDEN = Path(__file__).parents[1] / "golden"
FULL, SLIDING = "full_attention", "sliding_attention"
ROPE_SCALING = {"rope_parameters": None, "rope_theta": 10000.0}


def read(case, name="config.json"):
    return json.loads((GOLDEN / case / name).read_text())


def config(case, **changes):
    """Of a golden checkpoint; `...` removes a field."""
    fields = {**read(case), **changes}
    fields = {key: value for key, value in fields.items() if value is not ...}
    return Family(HFConfig(fields, "dir/config.json")).cfg


def error(case, **changes):
    with pytest.raises(CheckpointError) as caught:
        config(case, **changes)
    message = str(caught.value)
    assert message.startswith("dir/config.json: ")
    assert "\n" not in message
    return message


def windows(cfg):
    return [kind.window for kind in cfg.layer_kinds]


@pytest.mark.parametrize(
    "case",
    sorted(str(path.parent.relative_to(GOLDEN)) for path in GOLDEN.glob("*/*/config_v4.json")),
)
def test_configs_of_older_releases_mean_the_same(case):
    old = Family(HFConfig(read(case, "config_v4.json"))).cfg
    assert old == Family(HFConfig(read(case))).cfg


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("internlm/internlm2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; allowed: 'silu'"),
        ("internlm/internlm2", {"bias": 1}, "bias is 1; allowed: true or false"),
        (
            "internlm/internlm2",
            {"tie_word_embeddings": True},
            "tie_word_embeddings is True; allowed: False",
        ),
        ("internlm/internlm3", {"bias": "no"}, "bias is 'no'; allowed: true or false"),
        ("internlm/internlm3", {"qkv_bias": 0}, "qkv_bias is 0; allowed: true or false"),
        ("qwen/qwen2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; allowed: 'silu'"),
        (
            "qwen/qwen2",
            {"layer_types": [FULL]},
            "layer_types is ['full_attention']; allowed: a list",
        ),
        (
            "qwen/qwen2",
            {"layer_types": [FULL, "linear_attention"]},
            "allowed: a list of 2 of 'full",
        ),
        ("qwen/qwen2", {"layer_types": [FULL, 1]}, "layer_types is ['full_attention', 1]"),
        ("qwen/qwen2", {"layer_types": [[], []]}, "layer_types is [[], []]; allowed"),
        ("qwen/qwen2", {"use_sliding_window": False}, "allowed: a list of 2 of 'full_attention'"),
        ("qwen/qwen2", {"sliding_window": 0}, "sliding_window is 0; allowed: a positive integer"),
        ("qwen/qwen2", {"layer_types": ..., "max_window_layers": -1}, "max_window_layers is -1"),
        ("qwen/qwen2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("qwen/qwen3", {"attention_bias": None, "rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ("glm/glm", {"partial_rotary_factor": 0.2, "rope_parameters": None}, "9 dims are rotated"),
        ("glm/glm", {"rope_parameters": {"partial_rotary_factor": 2.0}}, "at most 1"),
        ("glm/glm4", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; allowed: 'silu'"),
        (
            "gemma/gemma2",
            {"hidden_activation": "relu"},
            "hidden_activation is 'relu'; allowed: 'silu'",
        ),
        (
            "gemma/gemma2",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention is True",
        ),
        ("gemma/gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping is 0; allowed"),
        ("gemma/gemma2", {"final_logit_softcapping": "30"}, "final_logit_softcapping is '30'"),
        ("gemma/gemma2", {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar is -1"),
        (
            "gemma/gemma3",
            {"attn_logit_softcapping": 50.0},
            "attn_logit_softcapping is 50.0; allowed",
        ),
        (
            "gemma/gemma3",
            {"layer_types": ["chunked_attention"] * 4},
            "allowed: a list of 4 of 'slid",
        ),
        (
            "gemma/gemma3",
            {"layer_types": ..., "sliding_window_pattern": 0},
            "pattern is 0; allowed",
        ),
        (
            "gemma/gemma3",
            {"rope_parameters": {FULL: 1}},
            "full_attention is 1; allowed: null or an",
        ),
        (
            "gemma/gemma3",
            {"rope_parameters": {FULL: {"rope_type": "proportional"}}},
            "rope_parameters: full_attention has rope_type 'proportional'; allowed: default",
        ),
        (
            "gemma/gemma3",
            {"rope_parameters": {"rope_type": "linear", "factor": 8.0}},
            "rope_parameters: factor is 8.0; allowed: only full_attention and sliding_attention",
        ),
        (
            "gemma/gemma3",
            {"rope_scaling": {"factor": 8.0}},
            "rope_scaling is {'factor': 8.0}; allow",
        ),
        ("phi/phi3", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type is 'longrope'"),
        ("phi/phi3", {**ROPE_SCALING, "rope_scaling": {"type": "su"}}, "type is 'su'; allowed"),
        ("phi/phi3", {**ROPE_SCALING, "rope_scaling": {"type": "yarn"}}, "type is 'yarn'; allowed"),
        (
            "granite/granite",
            {"residual_multiplier": 0},
            "residual_multiplier is 0; allowed: a posi",
        ),
        (
            "granite/granite",
            {"logits_scaling": None, "attention_multiplier": "x"},
            "is 'x'; allowed",
        ),
        (
            "smollm3/smollm3",
            {"use_sliding_window": True},
            "use_sliding_window is True; allowed: False",
        ),
        (
            "smollm3/smollm3",
            {"no_rope_layers": [1, 0]},
            "no_rope_layers is [1, 0]; allowed: 3 of 0",
        ),
        ("smollm3/smollm3", {"no_rope_layers": [1, 0, 2]}, "no_rope_layers is [1, 0, 2]; allowed"),
        (
            "smollm3/smollm3",
            {"layer_types": [FULL, FULL, SLIDING]},
            "allowed: a list of 3 of 'full",
        ),
        ("olmo2/olmo2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; allowed: 'silu'"),
        ("stablelm/stablelm", {"qk_layernorm": True}, "qk_layernorm is True; allowed: False"),
        ("stablelm/stablelm", {"use_parallel_residual": True}, "use_parallel_residual is True"),
        ("stablelm/stablelm", {"layer_norm_eps": 0}, "layer_norm_eps is 0; allowed: a positive"),
        (
            "llama/llama_linear_rope",
            {"rope_scaling": {"type": "linear", "factor": 4.0}},
            "rope_scaling is {'type': 'linear', 'factor': 4.0}; allowed: null, since there is",
        ),
    ],
)
def test_what_is_not_computed_is_refused_by_name(case, changes, message):
    assert message in error(case, **changes)


ODD = [None, True, 0, -1, 1, 1.5, 10**30, "x", "", [], {}, [1], {"a": 1}, float("nan"), [[]]]


@pytest.mark.parametrize(
    "case",
    [
        "gemma/gemma3",
        "glm/glm4",
        "granite/granite",
        "internlm/internlm2",
        "internlm/internlm3",
        "phi/phi3",
        "qwen/qwen3",
        "smollm3/smollm3",
        "stablelm/stablelm",
    ],
)
def test_odd_values_raise_nothing_else(case):
    """A config, or a CheckpointError that is one line; a rope can compute its frequencies."""
    ropes = set()
    for name in ("config.json", "config_v4.json"):
        if not (GOLDEN / case / name).exists():
            continue
        fields = read(case, name)
        nested = [
            {**fields, outer: {**inner, field: value}}
            for outer, inner in fields.items()
            if isinstance(inner, dict)
            for field in (*inner, "rope_type", "factor", "rope_theta")
            for value in (*ODD, "linear", "dynamic", "yarn")
        ]
        for changed in [{**fields, f: value} for f in fields for value in ODD] + nested:
            try:
                cfg = Family(HFConfig(changed)).cfg
            except CheckpointError as e:
                message = str(e)
            else:
                ropes |= {kind.rope for kind in cfg.layer_kinds if kind.rope is not None}
                continue
            assert "\n" not in message
    assert ropes
    for rope in ropes:
        assert jax.eval_shape(rope.frequencies).shape == (rope.dim // 2,)


def test_windows_of_qwen2():
    assert windows(config("qwen/qwen2", layer_types=...)) == [None, 7]
    assert windows(config("qwen/qwen2", layer_types=[SLIDING, FULL])) == [7, None]
    assert windows(config("qwen/qwen2", layer_types=..., use_sliding_window=False)) == [None] * 2
    assert windows(config("qwen/qwen2", sliding_window=None)) == [None] * 2
    assert windows(config("qwen/qwen2", layer_types=..., max_window_layers=0)) == [7, 7]


def test_windows_of_gemma():
    n = {"layer_types": ..., "num_hidden_layers": 7, "sliding_window": ...}
    assert windows(config("gemma/gemma2", **n)) == [4096, None] * 3 + [4096]
    six = windows(config("gemma/gemma3", **n, sliding_window_pattern=...))
    assert six == [4096] * 5 + [None, 4096]


def test_layers_of_gemma3_have_two_ropes():
    fields = {"rope_parameters": ..., "layer_types": [SLIDING, FULL], "num_hidden_layers": 2}
    local, whole = (kind.rope for kind in config("gemma/gemma3", **fields).layer_kinds)
    assert (local.theta, whole.theta) == (10000.0, 1000000.0)
    scaled = config("gemma/gemma3", **fields, rope_scaling={"type": "linear", "factor": 8.0})
    assert [kind.rope.factor for kind in scaled.layer_kinds] == [1.0, 8.0]


def test_null_asks_for_what_other_sizes_say():
    """A family's default stands for a field that is missing."""
    assert config("internlm/internlm3", num_key_value_heads=...).num_kv_heads == 2
    assert config("internlm/internlm3", num_key_value_heads=None).num_kv_heads == 10
    assert config("internlm/internlm3", head_dim=...).head_dim == 128
    assert config("internlm/internlm3", head_dim=None, hidden_size=40).head_dim == 4


def test_the_architecture_says_what_a_missing_model_type_would():
    for case in ("llama/mistral", "qwen/qwen3", "gemma/gemma2", "gemma/gemma3"):
        assert config(case, model_type=...) == config(case)


def test_yarn_knows_its_attention_factor():
    def factor(**options):
        rope = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64}
        (kind, _) = config("qwen/qwen3", rope_parameters={**rope, **options}).layer_kinds
        return kind.rope.attention_factor

    assert factor() == pytest.approx(1.3688879)  # 0.1 ln(40) + 1
    assert factor(mscale=1.0, mscale_all_dim=1.0) == 1.0
    assert factor(mscale=0.707, mscale_all_dim=1.0) == pytest.approx(0.921042, abs=1e-6)
    assert factor(attention_factor=0.5) == 0.5
    assert factor(factor=0.5) == 1.0
