"""Each dense family against transformers and against itself: cache, FP8, what is FP8, export."""

import functools
import shutil
from pathlib import Path

import builders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant as jq
from jaxquant.checkpoint.export import quantize_checkpoint
from jaxquant.errors import CheckpointError

GOLDEN = Path(__file__).parents[1] / "golden"
LLAMA_FP8 = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
NORMS = ("input_layernorm", "post_attention_layernorm")
QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
QKV_BIAS = tuple(f"self_attn.{name}_proj.bias" for name in "qkv")
OUTER = ("model.embed_tokens.weight", "model.norm.weight")
HEAD = (*OUTER, "lm_head.weight")
GLM_FP8 = (
    *LLAMA_FP8[:4],
    "mlp.gate_up_proj.gate_proj",
    "mlp.gate_up_proj.up_proj",
    "mlp.down_proj",
)
# case -> what becomes FP8 in a layer; what stays in a layer; what stays outside of them
SELECTION = {
    "internlm/internlm2": (
        (
            *(f"attention.wqkv.w{name}" for name in "qkv"),
            "attention.wo",
            *(f"feed_forward.w{i}" for i in "123"),
        ),
        ("attention_norm", "ffn_norm"),
        ("model.tok_embeddings.weight", "model.norm.weight", "output.weight"),
    ),
    "internlm/internlm3": (
        LLAMA_FP8,
        (*NORMS, *(f"{name}.bias" for name in LLAMA_FP8)),
        HEAD,
    ),
    "qwen/qwen2": (LLAMA_FP8, (*NORMS, *QKV_BIAS), OUTER),
    "qwen/qwen2_yarn": (LLAMA_FP8, (*NORMS, *QKV_BIAS), HEAD),
    "qwen/qwen3": (LLAMA_FP8, (*NORMS, *QK_NORMS), HEAD),
    "glm/glm": (GLM_FP8, (*NORMS, *QKV_BIAS), HEAD),
    "glm/glm4": (
        GLM_FP8,
        (*NORMS, "post_self_attn_layernorm", "post_mlp_layernorm"),
        HEAD,
    ),
    "gemma/gemma2": (
        LLAMA_FP8,
        (*NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        OUTER,
    ),
    "gemma/gemma3": (
        LLAMA_FP8,
        (*NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm", *QK_NORMS),
        OUTER,
    ),
    "phi/phi3": (
        (*(f"self_attn.qkv_proj.{name}_proj" for name in "qkv"), *GLM_FP8[3:]),
        NORMS,
        HEAD,
    ),
    "granite/granite": (LLAMA_FP8, NORMS, OUTER),
    "smollm3/smollm3": (LLAMA_FP8, NORMS, OUTER),
    "olmo2/olmo2": (
        LLAMA_FP8,
        (*QK_NORMS, "post_attention_layernorm", "post_feedforward_layernorm"),
        HEAD,
    ),
    "stablelm/stablelm": (
        LLAMA_FP8,
        (*NORMS, *(f"{name}.bias" for name in NORMS), *QKV_BIAS),
        (*HEAD, "model.norm.bias"),
    ),
}
CASES = list(SELECTION)
FAMILIES = [case for case in CASES if case != "qwen/qwen2_yarn"]
# One of each layout of tensors.
LAYOUTS = (
    "internlm/internlm2",
    "qwen/qwen3",
    "glm/glm4",
    "gemma/gemma3",
    "phi/phi3",
    "olmo2/olmo2",
    "stablelm/stablelm",
)
# Its rows divide the heads of 48 and of 16 and MLPs of 448 and of 176.
BLOCKS = (16, 128)


def relative(x, reference):
    x, reference = np.asarray(x, np.float32), np.asarray(reference, np.float32)
    return np.linalg.norm(x - reference) / np.linalg.norm(reference)


@functools.cache
def expected(case):
    return dict(np.load(GOLDEN / case / "expected.npz"))


@functools.cache
def golden(case):
    return jq.from_pretrained(GOLDEN / case, dtype=jnp.float32)


@functools.cache
def full_logits(case):
    """Of the prompts and what transformers generated."""
    return np.asarray(golden(case)(with_continuation(case)))


def with_continuation(case):
    return np.concatenate([expected(case)["tokens"], expected(case)["greedy"]], axis=1)


@functools.cache
def fp8(case):
    return jq.from_pretrained(GOLDEN / case, jq.QuantConfig(), dtype=jnp.float32)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_continuation_are_transformers(case):
    logits, greedy = full_logits(case), expected(case)["greedy"]
    T = expected(case)["tokens"].shape[1]
    assert relative(logits[:, :T], expected(case)["logits"]) < 1e-5
    assert np.array_equal(logits[:, T - 1 : -1].argmax(-1), greedy)


@pytest.mark.parametrize("case", ["internlm/internlm2", "internlm/internlm3"])
def test_dynamic_rope_stretches_texts_beyond_the_context(case):
    tokens = expected(case)["long_tokens"]
    assert tokens.shape[1] > golden(case).module.cfg.max_position
    assert relative(golden(case)(tokens), expected(case)["long_logits"]) < 1e-5


STEPS = 20


def prefilled_and_decoded(monkeypatch, case, cache_dtype=None):
    """Logits over a cache, and what `full_logits` has of the same tokens.

    Prompts of unequal lengths, padded beyond the context. What is in memory that a cache is made of
    is NaN.
    """
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(lax, "empty", builders.full_of_nan)
    tokens, lengths = with_continuation(case), np.array([9, 13], np.int32)
    rows = np.arange(2)
    padded = np.pad(tokens, ((0, 0), (0, 48 - tokens.shape[1])), constant_values=5)

    @jax.jit
    def run(module, padded):
        cache = module.empty_cache(2, 48, cache_dtype, awaited=48)
        logits, cache = module.prefill(padded, jnp.asarray(lengths), cache)

        def step(cache, _):
            logits, cache = module.decode(padded[rows, cache.lengths], cache)
            return cache, logits

        cache, later = lax.scan(step, cache, length=STEPS)
        return jnp.concatenate([logits[None], later]), cache.lengths

    logits, filled = run(golden(case).module, jnp.asarray(padded))
    assert np.array_equal(filled, lengths + STEPS)
    at = lengths - 1 + np.arange(STEPS + 1)[:, None]
    return logits, full_logits(case)[rows, at]


@pytest.mark.parametrize("case", FAMILIES)
def test_prefill_and_decode_equal_the_full_forward(monkeypatch, case):
    assert relative(*prefilled_and_decoded(monkeypatch, case)) < 1e-5


@pytest.mark.parametrize("case", ["llama/llama3", "gemma/gemma2"])
def test_an_fp8_cache_is_close_and_different(monkeypatch, case):
    logits, full = prefilled_and_decoded(monkeypatch, case, jnp.float8_e4m3fn)
    assert relative(logits[:1], full[:1]) < 1e-5  # prefill attends to what is not quantized
    assert 1e-3 < relative(logits, full) < 0.1


@pytest.mark.parametrize("case", ["llama/llama3", "gemma/gemma2"])
@pytest.mark.parametrize("weights", [golden, fp8])
def test_attention_in_fp8_is_close_and_different(case, weights):
    tokens, module = jnp.asarray(with_continuation(case)), weights(case).module
    rows, lengths = np.arange(2), np.array([9, 13], np.int32)
    padded = jnp.pad(tokens, ((0, 0), (0, 48 - tokens.shape[1])), constant_values=5)

    @jax.jit
    def run(module):
        cache = module.empty_cache(2, 48)
        args = padded, jnp.asarray(lengths), cache, "float8_e4m3fn"
        return module(tokens, "float8_e4m3fn"), module.prefill(*args)[0]

    logits, prefilled = run(module)
    assert 5e-3 < relative(logits, module(tokens)) < 0.2
    # With other tokens behind it, a prompt has another power of two at most.
    assert relative(prefilled, logits[rows, lengths - 1]) < 2e-2


@pytest.mark.parametrize("case", FAMILIES)
def test_fp8_is_close_and_different(case):
    logits = fp8(case)(with_continuation(case))
    assert 0.01 < relative(logits, full_logits(case)) < 0.25
    assert fp8(case).nbytes < golden(case).nbytes


@pytest.mark.parametrize("case", CASES)
def test_projections_become_fp8_and_nothing_else(case):
    quantized, kept, outer = SELECTION[case]
    layers = range(golden(case).module.cfg.num_layers)

    def tensors(names):
        names = [n if n.endswith(".bias") else f"{n}.weight" for n in names]
        return {f"model.layers.{l}.{name}" for l in layers for name in names}

    report = fp8(case).report
    assert {t.path.replace("/", ".") for t in report.quantized} == tensors(quantized)
    assert {t.path.replace("/", ".") for t in report.kept} == tensors(kept) | set(outer)


@pytest.mark.parametrize("case", LAYOUTS)
def test_an_export_has_the_names_of_its_source_and_loads_as_it_was(case, tmp_path):
    config = jq.QuantConfig(weight_block_size=BLOCKS)
    quantize_checkpoint(GOLDEN / case, tmp_path / "streamed", config)
    loaded = jq.from_pretrained(GOLDEN / case, config)
    loaded.save_pretrained(tmp_path / "saved")

    source, streamed = builders.load(GOLDEN / case), builders.load(tmp_path / "streamed")
    assert streamed == builders.load(tmp_path / "saved")
    new = streamed.keys() - source.keys()
    fp8 = {name for name, (dtype, _, _) in streamed.items() if dtype == "F8_E4M3"}
    assert new == {f"{name}_scale_inv" for name in fp8}
    assert source.keys() <= streamed.keys()
    assert all(streamed[name][1] == shape for name, (_, shape, _) in source.items())

    again = jq.from_pretrained(tmp_path / "streamed")
    assert jax.tree.structure(again.module) == jax.tree.structure(loaded.module)
    for x, y in zip(jax.tree.leaves(again.module), jax.tree.leaves(loaded.module), strict=True):
        assert np.array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


# Tensors that hold several projections -----------------------------------------------------------


def test_wqkv_is_quantized_as_q_k_and_v_alone_would_be():
    config = jq.QuantConfig(weight_block_size=(32, 16))  # 32 rows reach over the heads of 48
    case = "internlm/internlm2"
    module = jq.from_pretrained(GOLDEN / case, config, dtype=jnp.float32).module
    product = module.layers[0].self_attn.qkv_proj
    whole = jq.from_pretrained(GOLDEN / case, dtype=jnp.float32).module
    plain = whole.layers[0].self_attn.qkv_proj
    weight, exact = product.weight.get_value(), plain.weight.get_value()
    for (start, stop), (a, b) in zip(product.rows, plain.rows, strict=True):
        alone = jq.quantize(exact[:, a:b], config)
        assert np.array_equal(weight.qvalue[:, start:stop], alone.qvalue)
        assert np.array_equal(weight.scale[:, start // 32 : -(-stop // 32)], alone.scale)


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"weight_block_size": (32, 128)},
            "attention.wqkv.weight is written whole, but blocks of 32 rows do not divide its parts "
            "(wq 240, wk 48, wv 48 rows); take a weight_block_size that does",
        ),
        (
            {"weight_block_size": BLOCKS, "modules_to_not_convert": ("wk",)},
            "attention.wqkv.weight is written whole, so that all or none of wq, wk, wv can be FP8; "
            "name wqkv in modules_to_not_convert, or none of them",
        ),
    ],
)
def test_what_cannot_be_written_whole_is_refused(tmp_path, options, message, save):
    source, config = GOLDEN / "internlm/internlm2", jq.QuantConfig(**options)
    if save:
        export = jq.from_pretrained(source, config).save_pretrained
    else:
        export = functools.partial(quantize_checkpoint, source, config=config)
    with pytest.raises(CheckpointError) as caught:
        export(tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_fused_module_is_kept_by_its_own_name(tmp_path):
    config = jq.QuantConfig(weight_block_size=BLOCKS, modules_to_not_convert=("gate_up_proj",))
    quantize_checkpoint(GOLDEN / "phi/phi3", tmp_path / "out", config)
    again = jq.from_pretrained(tmp_path / "out")
    assert again.quant_config is not None
    kept = again.quant_config.modules_to_not_convert
    assert kept == (*(f"model.layers.{l}.mlp.gate_up_proj" for l in range(2)), "lm_head")
    assert builders.load(tmp_path / "out")["model.layers.1.mlp.gate_up_proj.weight"][0] == "BF16"


def internlm2_copy(folder, **changes):
    """The golden checkpoint, with tensors changed or (None) removed."""
    folder.mkdir()
    shutil.copy(GOLDEN / "internlm/internlm2/config.json", folder)
    weights = {}
    for name, (_, shape, data) in builders.load(GOLDEN / "internlm/internlm2").items():
        weights[name] = np.frombuffer(data, builders.BF16).reshape(shape)
    weights = {**weights, **changes}
    builders.save(folder / "model.safetensors", {n: w for n, w in weights.items() if w is not None})
    return folder


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (None, "missing tensors: model.layers.1.attention.wqkv.weight"),
        (
            (671, 20),
            "tensor 'model.layers.1.attention.wqkv.weight' has shape [671, 20]; config.json asks "
            "for 672 rows, of wq, wk, wv",
        ),
        ((), "'model.layers.1.attention.wqkv.weight' has shape []; config.json asks for 672"),
        ((672, 21), "wqkv.wq.weight has shape [480, 21]; config.json asks for [480, 20]"),
    ],
)
def test_a_fused_tensor_that_does_not_fit_is_refused(tmp_path, shape, message):
    wrong = None if shape is None else np.ones(shape, builders.BF16)
    name = "model.layers.1.attention.wqkv.weight"
    folder = internlm2_copy(tmp_path / "w", **{name: wrong})
    with pytest.raises(CheckpointError) as caught:
        jq.from_pretrained(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)


def test_stored_blocks_with_rows_of_two_projections_are_refused(tmp_path):
    config = jq.QuantConfig(weight_block_size=BLOCKS)
    quantize_checkpoint(GOLDEN / "internlm/internlm2", tmp_path / "out", config)
    stored = jq.QuantConfig(weight_block_size=(32, 128)).to_dict()
    builders.edit_json(tmp_path / "out" / "config.json", quantization_config=stored)
    with pytest.raises(CheckpointError, match=r"wqkv\.weight_scale_inv' has shape \[42, 1\]"):
        jq.from_pretrained(tmp_path / "out")
    name = "model.layers.1.attention.wqkv.weight"
    folder = internlm2_copy(
        tmp_path / "w",
        **{
            name: np.ones((672, 20), builders.E4M3),
            f"{name}_scale_inv": np.ones((21, 1), np.float32),
        },
    )
    builders.edit_json(folder / "config.json", quantization_config=stored)
    with pytest.raises(CheckpointError) as caught:
        jq.from_pretrained(folder)
    assert str(caught.value) == (
        f"{folder / 'model.safetensors'}: tensor '{name}_scale_inv' is for blocks of 32 rows, "
        "which do not divide its parts (wq 240, wk 48, wv 48 rows); start from the BF16 checkpoint"
    )
