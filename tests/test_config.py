"""QuantConfig: each field's allowed values, each error's words, and Hugging Face's dict."""

# pyright: reportArgumentType=false
# (`weight_block_size` takes an int too, and becomes a pair)

import copy
import dataclasses
import json
import pickle
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, strategies as st

from jaxquant.config import ConfigError, QuantConfig, keeps_module
from jaxquant.errors import JaxquantError

BLOCK = "a positive int or a pair of positive ints (out, in)"
NAMES = "a list of module paths"

names = st.lists(st.text(min_size=1, max_size=12), max_size=3)
configs = st.builds(
    QuantConfig,
    fmt=st.sampled_from(["e4m3", "e5m2"]),
    activation_scheme=st.sampled_from(["dynamic", None]),
    weight_block_size=st.integers(1, 4096) | st.tuples(*[st.integers(1, 4096)] * 2),
    scale_fmt=st.sampled_from(["ue8m0", None]),
    modules_to_not_convert=names.map(dict.fromkeys).map(tuple),
)

# What is allowed ----------------------------------------------------------------------------------


def test_defaults_are_deepseeks():
    assert QuantConfig() == QuantConfig(
        quant_method="fp8",
        fmt="e4m3",
        activation_scheme="dynamic",
        weight_block_size=(128, 128),
        scale_fmt=None,
        modules_to_not_convert=(),
    )


@pytest.mark.parametrize(
    ("fmt", "dtype"), [("e4m3", ml_dtypes.float8_e4m3fn), ("e5m2", ml_dtypes.float8_e5m2)]
)
def test_fmt_names_a_dtype(fmt, dtype):
    assert QuantConfig(fmt=fmt).fmt_dtype == np.dtype(dtype)


@pytest.mark.parametrize(
    ("came", "stored"),
    [
        (64, (64, 64)),
        ((1, 128), (1, 128)),
        ([128, 64], (128, 64)),
        (np.int64(32), (32, 32)),
        ((np.int32(8), 16), (8, 16)),
    ],
)
def test_block_size_is_stored_as_a_pair_of_python_ints(came, stored):
    block = QuantConfig(weight_block_size=came).weight_block_size
    assert block == stored
    assert [type(n) for n in block] == [int, int]


@pytest.mark.parametrize("came", [["a", "b"], ("a", "b"), None, []])
def test_modules_to_not_convert_is_stored_as_a_tuple(came: Any):
    assert QuantConfig(modules_to_not_convert=came).modules_to_not_convert == tuple(came or ())


# What is not --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "came", "allowed"),
    [
        ("quant_method", "awq", '"fp8"'),
        ("quant_method", None, '"fp8"'),
        ("quant_method", "FP8", '"fp8"'),
        ("fmt", "e3m4", '"e4m3" or "e5m2"'),
        ("fmt", "float8_e4m3fn", '"e4m3" or "e5m2"'),
        ("fmt", None, '"e4m3" or "e5m2"'),
        ("fmt", ["e4m3"], '"e4m3" or "e5m2"'),
        ("fmt", np.array(["e4m3", "e5m2"]), '"e4m3" or "e5m2"'),
        ("activation_scheme", "static", '"dynamic" or null (None)'),
        ("activation_scheme", False, '"dynamic" or null (None)'),
        ("activation_scheme", "", '"dynamic" or null (None)'),
        ("scale_fmt", "e8m0", '"ue8m0" or null (None)'),
        ("scale_fmt", "float32", '"ue8m0" or null (None)'),
        ("scale_fmt", 0, '"ue8m0" or null (None)'),
        ("weight_block_size", 0, BLOCK),
        ("weight_block_size", -128, BLOCK),
        ("weight_block_size", 128.0, BLOCK),
        ("weight_block_size", True, BLOCK),
        ("weight_block_size", None, BLOCK),
        ("weight_block_size", "128", BLOCK),
        ("weight_block_size", (), BLOCK),
        ("weight_block_size", [], BLOCK),
        ("weight_block_size", (128,), BLOCK),
        ("weight_block_size", (128, 128, 128), BLOCK),
        ("weight_block_size", (128, 0), BLOCK),
        ("weight_block_size", (128, -1), BLOCK),
        ("weight_block_size", (128, 64.0), BLOCK),
        ("weight_block_size", (True, 128), BLOCK),
        ("weight_block_size", (np.bool_(True), 128), BLOCK),
        ("weight_block_size", (128, None), BLOCK),
        ("weight_block_size", "ab", BLOCK),
        ("weight_block_size", {128, 64}, BLOCK),
        ("weight_block_size", {"out": 128, "in": 128}, BLOCK),
        ("modules_to_not_convert", "lm_head", NAMES),
        ("modules_to_not_convert", 3, NAMES),
        ("modules_to_not_convert", {"lm_head": True}, NAMES),
        ("modules_to_not_convert", [3], f"{NAMES} (non-empty strings)"),
        ("modules_to_not_convert", ["a", ""], f"{NAMES} (non-empty strings)"),
        ("modules_to_not_convert", [None], f"{NAMES} (non-empty strings)"),
    ],
    ids=str,
)
def test_a_bad_value_is_named_with_what_is_allowed(field: str, came: Any, allowed: str):
    with pytest.raises(ConfigError) as e:
        QuantConfig(**{field: came})
    assert str(e.value) == f"quantization config: {field} is {came!r}; allowed: {allowed}"
    assert e.value.field == field
    assert isinstance(e.value, JaxquantError)
    with pytest.raises(ConfigError) as e:
        QuantConfig.from_dict({"quant_method": "fp8", field: came})
    assert str(e.value).startswith(f"quantization config: {field} is {came!r}; allowed: ")


def test_replacing_a_field_checks_it_too():
    with pytest.raises(ConfigError, match="weight_block_size is 0"):
        dataclasses.replace(QuantConfig(), weight_block_size=0)


# Hugging Face's dict ------------------------------------------------------------------------------


@given(configs)
def test_dict_round_trip_through_json(config):
    again = QuantConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.to_dict() == config.to_dict()


def test_what_becomes_of_the_head_is_no_part_of_the_format():
    assert QuantConfig(quantize_head=True).to_dict() == QuantConfig().to_dict()
    assert QuantConfig(quantize_head=True).numerics() == QuantConfig()
    with pytest.raises(ConfigError, match="quantize_head"):
        QuantConfig.from_dict({"quant_method": "fp8", "quantize_head": True})


def test_to_dict_has_the_names_that_other_readers_look_for():
    assert QuantConfig(modules_to_not_convert=("lm_head",)).to_dict() == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "scale_fmt": None,
        "modules_to_not_convert": ["lm_head"],
    }


def test_deepseek_v3s_dict_is_read():
    config = QuantConfig.from_dict(
        {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        }
    )
    assert config == QuantConfig(scale_fmt="ue8m0")


@pytest.mark.parametrize("missing", [{}, {"fmt": "e4m3"}])
def test_quant_method_is_required(missing):
    with pytest.raises(ConfigError, match=r'^quantization config: quant_method .*"fp8" .*required'):
        QuantConfig.from_dict(missing)


def test_another_quant_method_is_told_before_its_foreign_keys():
    with pytest.raises(ConfigError, match="quant_method is 'gptq'; allowed: \"fp8\""):
        QuantConfig.from_dict({"bits": 4, "quant_method": "gptq"})


@pytest.mark.parametrize("came", [None, [], "fp8", 3])
def test_what_is_no_object_is_refused(came: Any):
    with pytest.raises(ConfigError) as e:
        QuantConfig.from_dict(came)
    assert str(e.value) == (
        f"quantization config: quantization_config is {came!r}; allowed: a JSON object"
    )


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("weight_blocksize", "weight_block_size"),
        ("block_size", "weight_block_size"),
        ("activation_sheme", "activation_scheme"),
        ("scale_format", "scale_fmt"),
        ("format", "fmt"),
        ("modules_not_to_convert", "modules_to_not_convert"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(key, near):
    with pytest.raises(ConfigError) as e:
        QuantConfig.from_dict({"quant_method": "fp8", key: 1})
    assert str(e.value).startswith(f"quantization config: {key} is 1; ")
    assert f"did you mean {near!r}?" in str(e.value)


@pytest.mark.parametrize("key", ["zzz", "", "foreign", 3])
def test_an_unknown_key_near_none_lists_all(key):
    with pytest.raises(ConfigError) as e:
        QuantConfig.from_dict({"quant_method": "fp8", key: 1})
    for name in ("quant_method", "fmt", "activation_scheme", "weight_block_size", "scale_fmt"):
        assert name in str(e.value)


FOREIGN = {
    "dequantize": False,
    "kv_cache_scheme": None,
    "packed_modules_mapping": {"qkv_proj": ["q_proj", "k_proj", "v_proj"]},
    "use_deep_gemm": True,
    "version": "1.2",
}


def test_known_foreign_keys_are_kept_and_change_nothing():
    config = QuantConfig.from_dict({"quant_method": "fp8", **FOREIGN})
    assert config == QuantConfig()
    assert hash(config) == hash(QuantConfig())
    assert config.to_dict() == {**FOREIGN, **QuantConfig().to_dict()}
    assert QuantConfig.from_dict(config.to_dict()).foreign == config.foreign


def test_ignored_layers_is_another_name_for_modules_to_not_convert():
    config = QuantConfig.from_dict(
        {
            "quant_method": "fp8",
            "modules_to_not_convert": ["a", "b"],
            "ignored_layers": ["b", "c"],
        }
    )
    assert config.modules_to_not_convert == ("a", "b", "c")
    with pytest.raises(ConfigError, match="ignored_layers is 'lm_head'; allowed: a list"):
        QuantConfig.from_dict({"quant_method": "fp8", "ignored_layers": "lm_head"})


@pytest.mark.parametrize("came", [0, False, "", {}])
def test_an_empty_value_that_is_no_list_is_still_bad(came):
    with pytest.raises(ConfigError, match="modules_to_not_convert is"):
        QuantConfig.from_dict({"quant_method": "fp8", "modules_to_not_convert": came})


@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers"])
def test_null_means_no_modules(key):
    assert QuantConfig.from_dict({"quant_method": "fp8", key: None}) == QuantConfig()


# As a value ---------------------------------------------------------------------------------------


@given(configs)
def test_equal_configs_hash_alike_and_copies_are_equal(config):
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config
        assert hash(other) == hash(config)


def test_is_a_static_argument_that_compiles_once():
    calls = []

    @jax.jit
    def double(x):
        return 2 * x

    def traced(x, config):
        calls.append(config)
        return double(x)

    f = jax.jit(traced, static_argnums=1)
    f(1.0, QuantConfig(weight_block_size=128))
    f(2.0, QuantConfig(weight_block_size=(128, 128)))
    f(3.0, QuantConfig.from_dict({"quant_method": "fp8", **FOREIGN}))
    assert len(calls) == 1
    f(3.0, QuantConfig(fmt="e5m2"))
    assert len(calls) == 2


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantConfig().fmt = "e5m2"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"fmt": "e5m2"}, False),
        ({"weight_block_size": (128, 64)}, False),
        ({"scale_fmt": "ue8m0"}, False),
        ({"activation_scheme": None}, True),
        ({"modules_to_not_convert": ("lm_head",)}, True),
    ],
    ids=str,
)
def test_same_bytes_looks_at_what_decides_the_bytes(change, same):
    assert QuantConfig(**change).same_bytes(QuantConfig()) is same


def test_describe():
    assert QuantConfig().describe() == "e4m3, blocks of 128x128, float32 scales"
    other = QuantConfig(fmt="e5m2", weight_block_size=(1, 64), scale_fmt="ue8m0")
    assert other.describe() == "e5m2, blocks of 1x64, ue8m0 scales"


def test_numerics_drops_names_only():
    config = QuantConfig.from_dict(
        {"quant_method": "fp8", "fmt": "e5m2", "modules_to_not_convert": ["a"], **FOREIGN}
    )
    assert config.numerics() == QuantConfig(fmt="e5m2")
    assert not config.numerics().foreign


# modules_to_not_convert ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "path", "matches"),
    [
        ("lm_head", "lm_head/weight", True),
        ("lm_head", "model/lm_head/weight", True),
        ("model.layers.0.mlp", "model/layers/0/mlp/up_proj/weight", True),
        ("model/layers/0/mlp", "model/layers/0/mlp/up_proj/weight", True),
        ("layers.0", "model/layers/10/mlp/up_proj/weight", False),
        ("layers.1", "model/layers/10/mlp/up_proj/weight", False),
        ("mlp.gate", "model/layers/0/mlp/gate/weight", True),
        ("mlp.gate", "model/layers/0/mlp/gate_proj/weight", False),
        ("gate", "model/layers/0/mlp/gate_proj/weight", False),
        ("model.layers.0.self_attn.q_proj", "layers/0/self_attn/q_proj/weight", False),
        ("up_proj.weight", "mlp/up_proj/weight", True),
        ("a.b.c", "b/c", False),
    ],
)
def test_an_entry_matches_whole_components(entry, path, matches):
    config = QuantConfig(modules_to_not_convert=("never", entry))
    assert keeps_module(config, path.split("/")) == (entry if matches else None)
