"""What config.json may say: every field that the model cannot compute is refused by name."""

import builders
import pytest

from jaxquant.errors import CheckpointError
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.registry import ARCHITECTURES, Family

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}


def family(**changes):
    fields = {**builders.CONFIG, **changes}
    return Family(HFConfig({k: v for k, v in fields.items() if v is not ...}, "dir/config.json"))


def error(**changes):
    with pytest.raises(CheckpointError) as caught:
        family(**changes)
    message = str(caught.value)
    assert message.startswith("dir/config.json: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "architectures", [["FooForCausalLM"], [], None, ..., "LlamaForCausalLM", [["x"]], [{}], [None]]
)
def test_an_unknown_architecture_lists_the_supported_ones(architectures):
    message = error(architectures=architectures)
    assert all(name in message for name in ARCHITECTURES)
    if architectures == ["FooForCausalLM"]:
        assert "'FooForCausalLM'" in message


@pytest.mark.parametrize(
    "field",
    [
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "vocab_size",
    ],
)
@pytest.mark.parametrize("value", [0, -1, 1.5, "64", True, [64]])
def test_a_bad_size_is_named(field, value):
    message = error(**{field: value})
    assert f"{field} is {value!r}; allowed: a positive integer" in message


@pytest.mark.parametrize(
    "field",
    ["hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"],
)
def test_a_missing_size_is_named(field):
    assert f"{field} is None" in error(**{field: ...})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; allowed: 'silu'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; allowed: a divisor"),
        ({"num_attention_heads": 65}, "num_key_value_heads is 2; allowed: a divisor"),
        ({"hidden_size": 2}, "head_dim is None"),
        ({"head_dim": 15}, "head_dim is 15; allowed: an even number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; allowed: true or false"),
        ({"attention_bias": 1}, "attention_bias is 1"),
        ({"mlp_bias": 0}, "mlp_bias is 0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({**MISTRAL, "sliding_window": 0}, "sliding_window is 0"),
    ],
)
def test_a_field_out_of_range_is_named(changes, named):
    assert named in error(**changes)


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("rope", "named"),
    [
        (
            {"rope_type": "longrope", "factor": 4.0},
            "rope_type 'longrope'; allowed: default, linear",
        ),
        ({"type": "mrope"}, "rope_type 'mrope'"),
        ({"mrope_section": [1, 2]}, "mrope_section is [1, 2]; allowed: with rope_type 'default'"),
        (
            {"type": "dynamic", "factor": 2.0, "alpha": 1000},
            "alpha is 1000; allowed: with rope_type",
        ),
        ({"rope_type": "yarn"}, "factor is None"),
        ({"type": "yarn", "factor": 4.0, "beta_fast": "32"}, "beta_fast is '32'"),
        ({"type": "yarn", "factor": 4.0, "attention_factor": 0}, "attention_factor is 0"),
        ({"type": "yarn", "factor": 4.0, "truncate": 1}, "truncate is 1; allowed: true or false"),
        ({"rope_type": ["llama3"]}, "rope_type ['llama3']"),
        ({"rope_type": "linear"}, "factor is None"),
        ({"rope_type": "linear", "factor": 0}, "factor is 0"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25"),
        ({k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}, "low_freq_factor is None"),
        (
            {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"},
            "original_max_position_embeddings is None",
        ),
        ({**LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor is 1.0; allowed: more than"),
        ("linear", "'linear'; allowed: null or an object"),
    ],
)
def test_a_rope_that_is_not_computed_is_refused(field, rope, named):
    message = error(**{field: rope})
    assert named in message
    assert field in message


def test_null_means_the_default():
    null = dict.fromkeys(
        ["num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling",
         "rope_parameters", "tie_word_embeddings", "attention_bias", "mlp_bias"]
    )  # fmt: skip
    missing = dict.fromkeys(null, ...)
    assert family(**null).cfg == family(**missing).cfg
    assert family(**null).cfg.num_kv_heads == 4


def test_a_null_rope_parameters_hides_no_rope_scaling():
    scaling = {"type": "linear", "factor": 2.0}
    cfg = family(rope_parameters=None, rope_scaling=scaling).cfg
    assert (cfg.layer_kinds[0].rope.scaling, cfg.layer_kinds[0].rope.factor) == ("linear", 2.0)


def test_mistral_has_its_own_defaults():
    missing = {"num_key_value_heads": ..., "max_position_embeddings": ...}
    cfg = family(**MISTRAL, **missing, num_attention_heads=8).cfg
    assert (cfg.num_kv_heads, cfg.max_position, cfg.layer_kinds[0].window) == (8, 131072, 4096)
    assert family(**MISTRAL, sliding_window=None).cfg.layer_kinds[0].window is None
    assert family(sliding_window=16).cfg.layer_kinds[0].window is None  # Llama has none


def test_head_dim_need_not_be_a_share_of_hidden_size():
    slots = family(head_dim=48).slots()
    assert slots["model.layers.1.self_attn.q_proj.weight"].shape == (192, 64)
    assert slots["model.layers.1.self_attn.o_proj.weight"].shape == (64, 192)


@pytest.mark.parametrize("tied", [True, False])
def test_slots_are_the_checkpoints_tensors(tied):
    config = {**builders.CONFIG, "tie_word_embeddings": tied}
    slots = family(tie_word_embeddings=tied).slots()
    assert {name: slot.shape for name, slot in slots.items()} == builders.shapes(config)
    assert next(iter(slots)) == "model.embed_tokens.weight"
    assert slots["model.layers.1.mlp.up_proj.weight"].layer == 1
    assert slots["model.norm.weight"].layer is None


def test_biases_have_slots():
    names = family(attention_bias=True, mlp_bias=True).slots().keys()
    biases = {name for name in names if name.endswith(".bias")}
    assert len(biases) == 2 * len(builders.PROJECTIONS)
    assert "model.layers.0.self_attn.o_proj.bias" in biases
