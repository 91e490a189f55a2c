"""The Llama family against transformers, and against itself: cache, batches, stacks, FP8."""

import json
import shutil
from pathlib import Path

import builders
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.models import decoder
from jaxquant.models.hf_config import HFConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "llama"
CASES = sorted(path.name for path in GOLDEN.iterdir())
TOLERANCE = 1e-4


def relative(x, reference):
    x, reference = np.asarray(x, np.float32), np.asarray(reference, np.float32)
    return np.linalg.norm(x - reference) / np.linalg.norm(reference)


def expected(case):
    return np.load(GOLDEN / case / "expected.npz")


@pytest.fixture(scope="module")
def golden():
    """case -> the model in float32, loaded once."""
    models = {}

    def load(case):
        if case not in models:
            models[case] = jq.from_pretrained(GOLDEN / case, dtype=jnp.float32)
        return models[case]

    return load


@pytest.mark.parametrize("case", CASES)
def test_logits_are_transformers(golden, case):
    logits = golden(case)(expected(case)["tokens"])
    assert logits.dtype == jnp.float32
    assert relative(logits, expected(case)["logits"]) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_greedy_continuation_is_transformers(golden, case):
    new = golden(case).generate(expected(case)["tokens"], max_new_tokens=12, stop_tokens=())
    assert np.array_equal(new, expected(case)["greedy"])


@pytest.mark.parametrize("case", ["llama3", "llama_linear_rope"])
def test_configs_of_older_releases_mean_the_same(golden, tmp_path, case):
    shutil.copy(GOLDEN / case / "config_v4.json", tmp_path / "config.json")
    shutil.copy(GOLDEN / case / "model.safetensors", tmp_path)
    old = jq.from_pretrained(tmp_path, dtype=jnp.float32)
    assert old.module.cfg == golden(case).module.cfg


def test_prefill_and_decode_equal_the_full_forward(golden):
    case = "mistral"
    module, tokens = golden(case).module, expected(case)["tokens"]
    full = golden(case)(tokens)
    cache = module.empty_cache(2, 32)
    lengths = np.array([9, 13], np.int32)  # the padding behind is other tokens, and ignored
    logits, cache = module.prefill(jnp.asarray(tokens), jnp.asarray(lengths), cache)
    assert relative(logits, full[np.arange(2), lengths - 1]) < TOLERANCE
    for step in range(4):
        at = lengths + step
        logits, cache = module.decode(jnp.asarray(tokens[np.arange(2), at]), cache)
        assert relative(logits, full[np.arange(2), at]) < TOLERANCE
    assert np.array_equal(cache.lengths, lengths + 4)


def test_a_decode_step_with_unrolled_layers_is_the_same(golden, monkeypatch):
    module, lengths = golden("mistral").module, jnp.zeros(2, jnp.int32)

    def logits(unrolled):
        monkeypatch.setattr(decoder, "_unrolled", lambda devices: unrolled)
        return module.decode(lengths, module.empty_cache(2, 32))[0]

    for layers in (2, 3, 4):
        assert np.array_equal(logits(layers), logits(1))


def test_a_batch_of_unequal_prompts_equals_each_alone(golden):
    case = "mistral"
    model, tokens = golden(case), expected(case)["tokens"][0].tolist()
    prompts = [tokens[:3], tokens, tokens[5:16]]
    together = model.generate(prompts, max_new_tokens=10, stop_tokens=())
    alone = [model.generate([p], max_new_tokens=10, stop_tokens=())[0] for p in prompts]
    assert together == alone


def test_a_token_sees_no_later_one_and_nothing_beyond_the_window(golden):
    model, tokens = golden("mistral"), expected("mistral")["tokens"][:1]
    window, layers = model.module.cfg.layer_kinds[0].window, model.module.cfg.num_layers
    reference = np.asarray(model(tokens))[0]
    changed = tokens.copy()
    changed[0, 2] = (changed[0, 2] + 1) % model.module.cfg.vocab_size
    difference = np.abs(np.asarray(model(changed))[0] - reference).max(-1)
    reach = 2 + layers * (window - 1)  # each layer passes a token on to window - 1 later ones
    assert (difference[:2] == 0).all()
    assert (difference[2:4] > 0).all()
    assert difference[reach] > 0
    assert (difference[reach + 1 :] == 0).all()


def test_bfloat16_is_close(golden):
    case = "llama2"
    model = jq.from_pretrained(GOLDEN / case)
    logits = model(expected(case)["tokens"])
    assert logits.dtype == jnp.float32
    assert 1e-4 < relative(logits, expected(case)["logits"]) < 0.05


@pytest.mark.parametrize("activation_scheme", ["dynamic", None])
def test_fp8_is_close_and_different(golden, activation_scheme):
    case = "llama_bias"
    config = jq.QuantConfig(activation_scheme=activation_scheme)
    model = jq.from_pretrained(GOLDEN / case, config, dtype=jnp.float32)
    assert 0.01 < relative(model(expected(case)["tokens"]), expected(case)["logits"]) < 0.3
    assert model.nbytes < golden(case).nbytes


@pytest.mark.parametrize(
    ("kept", "segments"),
    [
        ([], [3]),
        (["model.layers.0.mlp.down_proj"], [1, 2]),
        (["model.layers.0.mlp.up_proj", "model.layers.2.self_attn.k_proj"], [1, 1, 1]),
    ],
)
def test_layers_that_differ_in_what_is_quantized(tmp_path, kept, segments):
    """Stacks of their own, and the numbers of a plain model of the dequantized weights."""
    weights = builders.tensors({**builders.CONFIG, "num_hidden_layers": 3})
    config = jq.QuantConfig(
        activation_scheme=None,
        weight_block_size=builders.BLOCKS,
        modules_to_not_convert=tuple(kept),
    )

    def is_kept(name):
        return not builders.is_projection(name) or any(f"{k}." in f"{name}." for k in kept)

    rounded = {
        name: w.astype(np.float32)
        if is_kept(name)
        else np.asarray(jq.quantize(w, config).dequantize(jnp.float32))
        for name, w in weights.items()
    }
    source = builders.checkpoint(tmp_path / "bf16", weights, num_hidden_layers=3)
    plain = builders.checkpoint(tmp_path / "rounded", rounded, num_hidden_layers=3)
    model = jq.from_pretrained(source, config, dtype=jnp.float32)
    reference = jq.from_pretrained(plain, dtype=jnp.float32)
    assert [len(stack.layers) for stack in model.module.stacks] == segments
    quantized = {t.path.replace("/", ".") for t in model.report.quantized}
    assert quantized == {name for name in weights if not is_kept(name)}
    tokens = np.arange(24, dtype=np.int32)[None]
    assert relative(model(tokens), reference(tokens)) < TOLERANCE
    if len(segments) > 1:
        new = model.generate(tokens, max_new_tokens=6, stop_tokens=())
        assert new == reference.generate(tokens, max_new_tokens=6, stop_tokens=())


def test_parameters_are_shapes_until_they_are_loaded(golden):
    from jaxquant.models.llama import Llama, LlamaConfig

    config = json.loads((GOLDEN / "llama2" / "config.json").read_text())
    module = Llama(LlamaConfig.from_hf(HFConfig(config)), jnp.bfloat16)
    weight = module.layers[0].mlp.down_proj.weight.get_value()
    assert (weight.shape, weight.dtype) == ((2, 64, 176), jnp.bfloat16)
    assert not hasattr(weight, "devices")
