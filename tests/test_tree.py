"""Which parameters become FP8 by default and by rules, in any tree, and what is reported."""

# pyright: reportArgumentType=false
# (`weight_block_size` takes an int too, and becomes a pair)

import collections
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, struct
from flax.core import FrozenDict
from jax.sharding import PartitionSpec as P
from numpy_reference import BF16, KINDS, differing, heavy_tailed, make_weight, normal, subnormal

from jaxquant import blocked, tree
from jaxquant.array import QuantizedArray
from jaxquant.config import QuantConfig
from jaxquant.errors import JaxquantError
from jaxquant.tree import Rule, decide, quantize_tree


def weight(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(make_weight(normal, shape, BF16, seed))


def quantized_paths(qparams: Any) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(
        qparams, is_leaf=lambda x: isinstance(x, QuantizedArray)
    )
    return [tree.path_name(p) for p, x in leaves if isinstance(x, QuantizedArray)]


# The default selection ----------------------------------------------------------------------------

QUANTIZED = [
    "model/layers/0/self_attn/q_proj/weight",
    "model/layers/0/self_attn/k_proj/weight",
    "model/layers/0/self_attn/v_proj/weight",
    "model/layers/0/self_attn/o_proj/weight",
    "model/layers/0/self_attn/qkv_proj/weight",
    "model/layers/0/self_attn/q_a_proj/weight",
    "model/layers/0/self_attn/q_b_proj/weight",
    "model/layers/0/self_attn/kv_a_proj_with_mqa/weight",
    "model/layers/0/self_attn/kv_b_proj/weight",
    "model/layers/10/mlp/gate_proj/weight",
    "model/layers/10/mlp/up_proj/weight",
    "model/layers/10/mlp/down_proj/weight",
    "model/layers/10/mlp/gate_up_proj/weight",
    "model/layers/3/mlp/experts/17/gate_proj/weight",
    "model/layers/3/mlp/experts/17/down_proj/weight",
    "model/layers/3/mlp/shared_experts/up_proj/weight",
    "model/layers/3/mlp/shared_expert/up_proj/weight",
    "model/layers/3/block_sparse_moe/experts/0/w1/weight",
    "model/layers/3/block_sparse_moe/experts/0/w2/weight",
    "model/layers/3/block_sparse_moe/experts/0/w3/weight",
    "model/layers/0/attention/wqkv/weight",
    "model/layers/0/attention/wo/weight",
    "model/layers/0/feed_forward/w1/weight",
    "model/layers/0/feed_forward/w2/weight",
    "model/layers/0/feed_forward/w3/weight",
    "model/language_model/layers/0/mlp/up_proj/weight",
    "transformer/h/0/attn/c_attn/weight",
    "transformer/h/0/mlp/c_fc/weight",
    "model/layers/0/mlp/dense_h_to_4h/weight",
    "params/Dense_0/kernel",
    "params/layers_0/attention/query/kernel",
    "params/layers_0/mlp/wi_0/kernel",
    "params/transformer/layers_1/mlp/up_proj/kernel",
    "layers/0/attn/q_proj/kernel",
    "encoder/layers/0/linear1/kernel",
    "up_proj/kernel",
    "wq",
]

KEPT = [
    "model/embed_tokens/weight",
    "model/tok_embeddings/weight",
    "transformer/wte/weight",
    "transformer/wpe/weight",
    "transformer/word_embeddings/weight",
    "lm_head/weight",
    "model/lm_head/weight",
    "model/norm/weight",
    "model/layers/0/input_layernorm/weight",
    "model/layers/0/post_attention_layernorm/weight",
    "model/layers/0/self_attn/q_norm/weight",
    "model/layers/0/self_attn/kv_a_layernorm/weight",
    "model/layers/0/attention_norm/weight",
    "transformer/h/0/ln_1/weight",
    "transformer/ln_f/weight",
    "model/layers/0/mlp/gate/weight",
    "model/layers/0/mlp/shared_expert_gate/weight",
    "model/layers/0/block_sparse_moe/gate/weight",
    "model/layers/0/mlp/router/weight",
    "model/layers/0/mlp/gate/e_score_correction_bias",
    "model/layers/0/self_attn/q_proj/bias",
    "model/layers/0/mlp/c_fc/bias",
    "visual/blocks/0/attn/qkv/weight",
    "model/visual/blocks/0/mlp/gate_proj/weight",
    "model/vision_tower/layers/0/mlp/up_proj/weight",
    "vision_model/encoder/layers/0/self_attn/q_proj/weight",
    "visual/patch_embed/proj/weight",
    "model/layers/61/shared_head/head/weight",
    "params/Embed_0/embedding",
    "params/token_embedder/embedding",
    "params/lm_head/kernel",
    "params/logits_dense/kernel",
    "params/LayerNorm_0/scale",
    "params/layers_0/pre_attention_norm/kernel",
    "params/MultiHeadDotProductAttention_0/query/bias",
    "params/layers_0/MoeBlock_0/gate/kernel",
    "embed/embedding",
]


@pytest.mark.parametrize("path", QUANTIZED)
def test_projections_are_quantized_by_default(path):
    decision = decide(path, (64, 64), jnp.dtype(jnp.bfloat16), QuantConfig())
    assert decision.config == QuantConfig()
    assert decision.contracting == ((-2,) if path.endswith("/kernel") else (-1,))
    assert decision.reason in ("projection", "matrix")


@pytest.mark.parametrize("path", KEPT)
def test_embeddings_heads_norms_biases_gates_and_vision_are_kept_by_default(path):
    assert decide(path, (64, 64), jnp.dtype(jnp.bfloat16), QuantConfig()).config is None


@pytest.mark.parametrize("path", ["output/weight", "model/output/weight"])
def test_internlm2s_head_is_kept_by_default(path):
    assert decide(path, (64, 64), jnp.dtype(jnp.bfloat16), QuantConfig()).config is None


def test_bert_like_output_projections_are_no_heads():
    path = "encoder/layer/0/attention/output/dense/weight"
    assert decide(path, (64, 64), jnp.dtype(jnp.bfloat16), QuantConfig()).config is not None


@pytest.mark.parametrize(
    ("path", "stack"),
    [
        ("layers/mlp/up_proj/weight", True),
        ("layers/mlp/experts/w1", True),
        ("layers/mlp/experts/down_proj", True),
        ("params/layers/q_proj/kernel", True),
        ("params/Conv_0/kernel", False),  # [window, in, out]
        ("conv1d/weight", False),
    ],
)
def test_a_third_axis_is_a_stack_only_for_known_projections(path, stack):
    decision = decide(path, (3, 64, 64), jnp.dtype(jnp.float32), QuantConfig())
    assert (decision.config is not None) == stack
    if not stack:
        assert decision.reason == "3-D: a rule must say which dimensions contract"


@pytest.mark.parametrize("shape", [(), (7,)])
def test_vectors_are_never_quantized(shape):
    decision = decide("up_proj/weight", shape, jnp.dtype(jnp.float32), QuantConfig(), [Rule("")])
    assert (decision.config, decision.reason) == (None, f"{len(shape)}-D")


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.bool_, jnp.complex64])
def test_what_is_not_floating_is_never_quantized(dtype):
    decision = decide("up_proj/weight", (4, 4), jnp.dtype(dtype), QuantConfig(), [Rule("")])
    assert (decision.config, decision.reason) == (None, f"dtype {jnp.dtype(dtype)}")


def test_modules_to_not_convert_are_kept_also_from_rules():
    config = QuantConfig(modules_to_not_convert=("a", "b.c"))
    params = {"a": {"w": weight(4, 4)}, "b": {"c": weight(4, 4), "d": weight(4, 4)}}
    qparams, report = quantize_tree(params, config, rules=["."])
    assert quantized_paths(qparams) == ["b/d"]
    assert [t.reason for t in report.kept] == [
        "modules_to_not_convert: a",
        "modules_to_not_convert: b.c",
    ]


# Rules --------------------------------------------------------------------------------------------

PARAMS = {
    "attn": {"q": weight(4, 8), "o": weight(8, 4)},
    "mlp": {"up": weight(16, 8), "bias": weight(16)},
}


def test_first_match_wins_and_what_none_matches_is_kept():
    e5m2, small = QuantConfig(fmt="e5m2"), QuantConfig(weight_block_size=4)
    rules = [Rule("attn/q", skip=True), Rule("^attn", config=e5m2), "up$"]
    qparams, report = quantize_tree(PARAMS, small, rules)
    assert qparams["attn"]["q"] is PARAMS["attn"]["q"]
    assert qparams["attn"]["o"].qvalue.dtype == jnp.float8_e5m2
    assert qparams["attn"]["o"].block_size == (128, 128)
    assert qparams["mlp"]["up"].block_size == (4, 4)
    assert qparams["mlp"]["bias"] is PARAMS["mlp"]["bias"]
    reasons = {t.path: t.reason for t in report.tensors}
    assert reasons == {
        "attn/o": "rule ^attn",
        "attn/q": "rule attn/q",
        "mlp/bias": "1-D",
        "mlp/up": "rule up$",
    }


def test_a_note_is_the_reason():
    _, report = quantize_tree(PARAMS, rules=[Rule("up", note="the wide one")])
    assert report.quantized[0].reason == "the wide one"


@pytest.mark.parametrize(
    ("name", "asked", "transposed"),
    [
        ("kernel", None, True),
        ("weight", None, False),
        ("kernel", False, False),
        ("weight", True, True),
        ("my_kernel", None, False),
    ],
)
def test_transposed_is_the_rules_or_by_the_name_kernel(name, asked, transposed):
    w = weight(200, 300)
    qparams, report = quantize_tree({name: w}, rules=[Rule(name, transposed=asked)])
    qa = qparams[name]
    assert qa.transposed == transposed
    assert qa.shape == report.tensors[0].shape == (200, 300)
    expected = blocked.quantize(w.T if transposed else w)
    assert differing(qa.qvalue, expected.qvalue) == 0
    assert differing(qa.scale, expected.scale) == 0
    error = jnp.abs(qa.dequantize(jnp.float32) - w.astype(jnp.float32)).max()
    assert error <= 0.0625 * jnp.abs(w).max()


# Several dimensions in or out ---------------------------------------------------------------------


def quantize_one(shape, contracting, name="w", **fields):
    rules = [Rule(name, contracting=contracting, **fields)]
    w = weight(*shape)
    qparams, report = quantize_tree({name: w}, QuantConfig(weight_block_size=(16, 8)), rules)
    return w, qparams[name], report


@pytest.mark.parametrize(
    ("shape", "contracting", "matrix", "in_dims", "out_dims"),
    [
        ((24, 4, 8), (-3,), (24, 32), (), (4, 8)),
        ((4, 8, 40), (-3, -2), (32, 40), (4, 8), ()),
        ((2, 3, 4, 8), (-4, -3), (6, 32), (2, 3), (4, 8)),
        ((5, 24, 4, 8), (-3,), (5, 24, 32), (), (4, 8)),  # of 5 layers
        ((5, 24, 8), (-2,), (5, 24, 8), (), ()),
    ],
)
def test_contracting_dimensions_before_the_outputs(shape, contracting, matrix, in_dims, out_dims):
    w, qa, _ = quantize_one(shape, contracting)
    assert (qa.shape, qa.transposed, qa.in_dims, qa.out_dims) == (shape, True, in_dims, out_dims)
    expected = blocked.quantize(w.reshape(matrix).mT, QuantConfig(weight_block_size=(16, 8)))
    assert differing(qa.qvalue, expected.qvalue) == 0
    assert differing(qa.scale, expected.scale) == 0
    assert differing(qa.dequantize(), expected.dequantize().mT.reshape(shape)) == 0


@pytest.mark.parametrize(
    ("shape", "contracting", "matrix", "in_dims"),
    [((40, 4, 8), (-2, -1), (40, 32), (4, 8)), ((5, 40, 8), (-1,), (5, 40, 8), ())],
)
def test_contracting_dimensions_after_the_output(shape, contracting, matrix, in_dims):
    w, qa, _ = quantize_one(shape, contracting)
    assert (qa.shape, qa.transposed, qa.in_dims, qa.out_dims) == (shape, False, in_dims, ())
    expected = blocked.quantize(w.reshape(matrix), QuantConfig(weight_block_size=(16, 8)))
    assert differing(qa.qvalue, expected.qvalue) == 0
    assert differing(qa.dequantize(), expected.dequantize().reshape(shape)) == 0


@pytest.mark.parametrize(
    ("contracting", "transposed"), [((-3,), True), ((-3, -2), True), ((-2, -1), False)]
)
def test_a_matrix_has_one_dimension_each_way_whatever_contracts(contracting, transposed):
    _, qa, _ = quantize_one((24, 40), contracting)
    assert (qa.shape, qa.transposed, qa.in_dims, qa.out_dims) == ((24, 40), transposed, (), ())


def test_too_few_dimensions_for_what_contracts():
    decision = decide(
        "w", (4, 8, 24), np.dtype(np.float32), QuantConfig(), [Rule("w", contracting=(-4, -3))]
    )
    assert decision.config is None
    assert decision.reason == "3-D: contracting=(-4, -3) does not fit"


@pytest.mark.parametrize("contracting", [(0,), (-1, -2), (-3, -1), (1, 2), -3, [-3]])
def test_contracting_dimensions_are_neighbours_counted_from_the_end(contracting: Any):
    with pytest.raises(JaxquantError) as e:
        Rule("w", contracting=contracting)
    assert str(e.value) == (
        f"rule 'w': contracting is {contracting}; allowed: a tuple of neighbours, counted from "
        "the end, such as (-3,) or (-3, -2)"
    )


def test_transposed_and_contracting_are_two_words_for_one_thing():
    with pytest.raises(
        JaxquantError, match=r"^rule 'w' has both transposed and contracting; leave"
    ):
        Rule("w", transposed=True, contracting=(-3,))


@pytest.mark.parametrize(
    ("path", "shape", "contracting"),
    [
        ("params/MultiHeadDotProductAttention_0/query/kernel", (24, 4, 8), (-3,)),
        ("params/layers/self_attention/value/kernel", (2, 24, 4, 8), (-3,)),
        ("params/MultiHeadDotProductAttention_0/out/kernel", (4, 8, 24), (-3, -2)),
        ("attention/out/kernel", (24, 24), (-2,)),
    ],
)
def test_flaxs_attention_is_known_by_its_names(path, shape, contracting):
    decision = decide(path, shape, np.dtype(np.float32), QuantConfig())
    assert (decision.contracting, decision.reason) == (contracting, "projection")


@pytest.mark.parametrize("rules", [["up", "nothing"], [Rule("nothing", skip=True), "up"]])
def test_a_rule_that_matches_nothing_is_an_error_that_lists_paths(rules):
    with pytest.raises(JaxquantError) as e:
        quantize_tree(PARAMS, rules=rules)
    assert str(e.value) == (
        "rule 'nothing' matches no parameter that no rule before it matches; "
        "the paths are: attn/o, attn/q, mlp/bias, mlp/up"
    )


def test_a_rule_in_the_shadow_of_another_is_an_error():
    with pytest.raises(JaxquantError, match=r"^rule 'mlp/up' matches no parameter"):
        quantize_tree(PARAMS, rules=["mlp", "mlp/up"])


@pytest.mark.parametrize("pattern", ["(", "*", None, 3, ("a",)])
def test_a_pattern_that_does_not_compile_is_named(pattern: Any):
    with pytest.raises(JaxquantError) as e:
        quantize_tree(PARAMS, rules=[pattern])
    assert str(e.value).startswith(f"rule {pattern!r} is no regular expression: ")


def test_rules_that_are_one_string_are_refused():
    with pytest.raises(JaxquantError, match=r"rules is 'up'; allowed: a sequence"):
        quantize_tree(PARAMS, rules="up")


@pytest.mark.parametrize(
    ("params", "config", "rules"),
    [
        ({"norm": weight(4), "embed": weight(4, 4)}, None, None),
        (PARAMS, None, None),
        (PARAMS, None, []),
        (PARAMS, None, [Rule(".", skip=True)]),
        (PARAMS, None, ["bias"]),
        (PARAMS, QuantConfig(modules_to_not_convert=("attn", "mlp")), ["."]),
        ({}, None, None),
    ],
)
def test_quantizing_nothing_is_an_error(params, config, rules):
    with pytest.raises(JaxquantError, match=r"^quantize_tree: FP8 was asked for and no parameter"):
        quantize_tree(params, config, rules)


def test_long_lists_of_paths_are_cut():
    params = {f"p{i}": weight(2, 2) for i in range(9)}
    with pytest.raises(JaxquantError, match=r"p0, p1, p2, p3, p4, p5, \.\.\. \(9 in all\)$"):
        quantize_tree(params)


# Trees --------------------------------------------------------------------------------------------


@struct.dataclass
class StructLayer:
    up_proj: Any
    norm: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DataclassLayer:
    up_proj: Any
    norm: Any


NamedLayer = collections.namedtuple("NamedLayer", ["up_proj", "norm"])
UP, NORM = weight(8, 4), weight(4, seed=1)


@pytest.mark.parametrize(
    ("params", "path"),
    [
        ({"layers": [{"up_proj": UP, "norm": NORM}]}, "layers/0/up_proj"),
        ({"layers": ({"up_proj": UP, "norm": NORM},)}, "layers/0/up_proj"),
        (FrozenDict({"params": {"up_proj": UP, "norm": NORM}}), "params/up_proj"),
        (StructLayer(UP, NORM), "up_proj"),
        (DataclassLayer(UP, NORM), "up_proj"),
        ([NamedLayer(UP, NORM)], "0/up_proj"),
        ({"up_proj": UP, "norm": NORM, "none": None}, "up_proj"),
        ({"up_proj": np.asarray(UP), "norm": np.asarray(NORM)}, "up_proj"),
        ({"up_proj": UP, "norm": NORM, "step": jnp.int32(3)}, "up_proj"),
        ({"up_proj": UP, "norm": NORM, "key": jax.random.key(0)}, "up_proj"),
    ],
    ids=[
        "list",
        "tuple",
        "frozen",
        "struct",
        "dataclass",
        "namedtuple",
        "none",
        "numpy",
        "int",
        "key",
    ],
)
def test_any_pytree(params, path):
    qparams, report = quantize_tree(params)
    assert type(qparams) is type(params)
    assert quantized_paths(qparams) == [path]
    assert [t.path for t in report.quantized] == [path]
    before, after = jax.tree.leaves(params), jax.tree.leaves(qparams)
    assert len(after) == len(before) + 1
    assert sum(a is b for a in after for b in before) == len(before) - 1


def test_a_leaf_that_is_no_array_is_named():
    with pytest.raises(JaxquantError, match=r"^mlp/n: int; allowed: arrays$"):
        quantize_tree({"mlp": {"up_proj": UP, "n": 3}})


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(4, 8, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, use_bias=False, rngs=rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.embed = nnx.Embed(5, 8, rngs=rngs)


BLOCK_PATHS = ["layers/0/kernel", "layers/1/kernel", "up/kernel"]


def test_nnx_state_with_random_keys_in_it():
    model = Block(nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    qstate, report = quantize_tree(state)
    assert isinstance(qstate, nnx.State)
    assert quantized_paths(qstate) == BLOCK_PATHS
    assert {t.path for t in report.kept} >= {"up/bias", "norm/scale", "embed/embedding"}
    merged = nnx.merge(graphdef, qstate)
    kernel = merged.up.kernel.get_value()
    assert isinstance(kernel, QuantizedArray)
    assert kernel.shape == (4, 8)
    before: Any = model.up.bias
    after: Any = merged.up.bias
    assert after.get_value() is before.get_value()


def test_nnx_module_itself_is_left_as_it_was():
    model = Block(nnx.Rngs(0))
    qmodel, _ = quantize_tree(model)
    assert isinstance(qmodel, Block)
    assert quantized_paths(qmodel) == BLOCK_PATHS
    after: Any = qmodel.layers[1].kernel
    before: Any = model.layers[1].kernel
    assert isinstance(after.get_value(), QuantizedArray)
    assert isinstance(before.get_value(), jax.Array)


def test_linen_variables_and_partitioned_boxes():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
            x = nn.Dense(8, kernel_init=init, name="up_proj")(x)
            x = nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
            return nn.Embed(5, 8)(jnp.argmax(x, -1))

    variables = jax.jit(Model().init)(jax.random.key(0), jnp.ones((2, 4)))
    qvariables, report = quantize_tree(variables)
    attention = "params/MultiHeadDotProductAttention_0"
    names = ("key", "out", "query", "value")
    assert quantized_paths(qvariables) == [
        *(f"{attention}/{name}/kernel" for name in names),
        "params/up_proj/kernel",
    ]
    box = qvariables["params"]["up_proj"]["kernel"]
    assert isinstance(box, nn.Partitioned)
    assert box.get_partition_spec() == P("in", "out")
    assert isinstance(nn.unbox(qvariables)["params"]["up_proj"]["kernel"], QuantizedArray)
    assert not any(t.quantized for t in report.tensors if "bias" in t.path)


def test_a_key_named_value_stays_in_the_path():
    assert quantized_paths(quantize_tree({"a": {"value": UP}}, rules=["/value$"])[0]) == ["a/value"]


# Already quantized --------------------------------------------------------------------------------


def test_quantized_leaves_stay_the_same_objects():
    first, _ = quantize_tree({"a": {"kernel": UP}})
    again, report = quantize_tree({**first, "b": {"kernel": UP}})
    assert again["a"]["kernel"] is first["a"]["kernel"]
    assert [t.reason for t in report.tensors] == ["already FP8", "matrix"]
    assert report.tensors[0].bytes_before == report.tensors[0].bytes_after == 8 * 4 + 4
    alone, _ = quantize_tree(first)
    assert alone["a"]["kernel"] is first["a"]["kernel"]


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(fmt="e5m2"),
        QuantConfig(weight_block_size=64),
        QuantConfig(scale_fmt="ue8m0"),
    ],
    ids=QuantConfig.describe,
)
def test_another_config_than_a_leaf_has_is_an_error_that_says_both(config):
    first, _ = quantize_tree({"a": {"kernel": UP}})
    with pytest.raises(JaxquantError) as e:
        quantize_tree(first, config)
    message = str(e.value)
    assert message.startswith("a/kernel is FP8 already (")
    assert "float8_e4m3fn[8,4], blocks 128x128" in message
    assert f"but {config.describe()} was asked for" in message


def test_a_quantized_leaf_that_no_rule_picks_may_differ():
    first, _ = quantize_tree({"a": {"kernel": UP}}, QuantConfig(fmt="e5m2"))
    again, _ = quantize_tree({**first, "b": UP}, rules=["^b"])
    assert again["a"]["kernel"] is first["a"]["kernel"]


# What is not finite, and errors -------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_nan_or_inf_names_the_parameter(bad):
    params = {"a": {"kernel": UP}, "b": {"kernel": weight(130, 300).at[129, 7].set(bad)}}
    with pytest.raises(JaxquantError, match=r"^b/kernel: NaN or Inf in 1 of 6 blocks"):
        quantize_tree(params)


def test_nan_in_what_is_kept_is_let_be():
    _, report = quantize_tree({"a": {"kernel": UP}, "embed": UP.at[0, 0].set(jnp.nan)})
    assert report.kept[0].path == "embed"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["weight", "kernel"])
def test_relative_error_is_that_of_float64(kind, name):
    w = make_weight(kind, (140, 270), np.dtype(np.float32), seed=3).clip(-1e30, 1e30)
    qparams, report = quantize_tree({name: w})
    w64, dq = w.astype(np.float64), np.asarray(qparams[name].dequantize(), np.float64)
    expected = np.linalg.norm(w64 - dq) / np.linalg.norm(w64)
    if kind is subnormal:  # squares of 1e-39 are zero in float32, whatever the unit
        expected = 0
    # A float32 rounding, 6e-8, is no error: XLA may keep the product of a subtraction exact.
    assert report.tensors[0].relative_error == pytest.approx(expected, rel=1e-3, abs=6e-8)


def test_relative_error_of_zeros_and_of_nothing():
    params = {"a": {"kernel": jnp.zeros((4, 4))}, "b": {"kernel": jnp.zeros((0, 4))}}
    _, report = quantize_tree(params)
    assert [t.relative_error for t in report.tensors] == [0.0, 0.0]


# The report ---------------------------------------------------------------------------------------


def test_report_has_every_tensor_in_order_with_its_bytes():
    params = {
        "embed": weight(10, 300),
        "layers": [{"norm": weight(300), "up_proj": weight(130, 300)} for _ in range(2)],
    }
    qparams, report = quantize_tree(params)
    assert [t.path for t in report.tensors] == [
        "embed",
        "layers/0/norm",
        "layers/0/up_proj",
        "layers/1/norm",
        "layers/1/up_proj",
    ]
    t = report.tensors[2]
    assert (t.shape, t.quantized, t.bytes_before) == ((130, 300), True, 2 * 130 * 300)
    assert t.bytes_after == qparams["layers"][0]["up_proj"].nbytes == 130 * 300 + 4 * 2 * 3
    assert t.relative_error == pytest.approx(0.0257, rel=0.05)
    assert report.bytes_before == sum(x.nbytes for x in jax.tree.leaves(params))
    assert report.bytes_after == sum(x.nbytes for x in jax.tree.leaves(qparams))
    assert "layers/*/up_proj" in str(report)
    assert "layers/*/up_proj" in report._repr_html_()
    assert report.kept[0].reason == "embedding"
    assert report.kept[0].relative_error is None


# Compilation --------------------------------------------------------------------------------------


def test_one_compilation_for_each_shape_and_layout():
    compiled: Any = tree._quantize_measured
    compiled.clear_cache()
    params = {
        f"layers_{i}": {"a": {"kernel": weight(6, 10)}, "b": {"weight": weight(12, 10)}}
        for i in range(5)
    }
    quantize_tree(params)
    assert compiled._cache_size() == 2
    quantize_tree(params, QuantConfig(weight_block_size=(128, 128)))
    assert compiled._cache_size() == 2


def test_the_same_bytes_as_quantize_alone():
    w = jnp.asarray(make_weight(heavy_tailed, (200, 300), BF16, seed=5))
    for config in (QuantConfig(), QuantConfig(fmt="e5m2", scale_fmt="ue8m0", weight_block_size=64)):
        qa = quantize_tree({"weight": w}, config)[0]["weight"]
        expected = blocked.quantize(w, config)
        assert differing(qa.qvalue, expected.qvalue) == 0
        assert differing(qa.scale, expected.scale) == 0
