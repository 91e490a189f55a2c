"""The real demo checkpoint: what `materialize` made of SmolLM2-135M-Instruct."""

import json
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

import jaxquant as jq

GOLDEN = Path(__file__).parents[1] / "golden"

pytestmark = pytest.mark.skipif(
    "JAXQUANT_TEST_MODEL" not in os.environ,
    reason="set JAXQUANT_TEST_MODEL to the folder that jaxquant.demo.checkpoint.materialize wrote",
)


@pytest.fixture(scope="module")
def model():
    return Path(os.environ["JAXQUANT_TEST_MODEL"])


@pytest.fixture(scope="module")
def tokenizer(model):
    return Tokenizer.from_file(str(model / "tokenizer.json"))


def test_tokens_are_smollm2s(tokenizer):
    for case in json.loads((GOLDEN / "smollm2_tokens.json").read_text()):
        ids = tokenizer.encode(case["text"]).ids
        assert ids == case["ids"], (case["text"], tokenizer.encode(case["text"]).tokens)
        assert tokenizer.decode(ids, skip_special_tokens=False) == case["text"]


def test_special_tokens_are_not_printed(tokenizer):
    ids = tokenizer.encode("<|im_start|>user\nHi<|im_end|>").ids
    assert ids[0] == 1
    assert ids[-1] == 2
    assert tokenizer.decode(ids) == "user\nHi"


def test_config_is_smollm2_135m_instructs(model):
    config = json.loads((model / "config.json").read_text())
    published = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 49152,
    }
    assert config == published


@pytest.fixture(scope="module")
def reference():
    """What torch gives: tokens and float32's most likely next ones; accuracy by name."""
    arrays = np.load(GOLDEN / "smollm2_reference.npz")
    return arrays, json.loads((GOLDEN / "smollm2_reference.json").read_text())["accuracy"]


@pytest.fixture(scope="module")
def scores(model, reference):
    """Perplexity and KL from float32 of each model, as torch's are defined, and its best tokens."""
    configs = {
        "float32": None,
        "w8a16_float32": jq.QuantConfig(activation_scheme=None),
        "w8a8_float32": jq.QuantConfig(),
    }
    models = {name: jq.from_pretrained(model, c, jnp.float32) for name, c in configs.items()}
    nll, kl, best = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0.0), []
    tokens = reference[0]["tokens"]
    for window in tokens:
        log_p = None
        for name, m in models.items():
            logits = m(window[None])[0]
            if log_p is None:
                log_p = jax.nn.log_softmax(logits[:-1])
                best.append(np.asarray(logits.argmax(-1)))
            new_nll, new_kl = score(logits, log_p, window)
            nll[name] += float(new_nll)
            kl[name] += float(new_kl)
    n = tokens.shape[0] * (tokens.shape[1] - 1)
    return {
        "perplexity": {name: math.exp(total / n) for name, total in nll.items()},
        "kl": {name: total / n for name, total in kl.items()},
        "argmax": np.stack(best),
    }


@jax.jit
def score(logits, reference, window):
    log_p = jax.nn.log_softmax(logits[:-1])
    nll = -jnp.take_along_axis(log_p, window[1:, None], -1).sum()
    return nll, (jnp.exp(reference) * (reference - log_p)).sum()


def test_float32_is_torchs(scores, reference):
    arrays, accuracy = reference
    assert scores["perplexity"]["float32"] == pytest.approx(
        accuracy["float32"]["perplexity"], rel=1e-3
    )
    assert (scores["argmax"] == arrays["argmax"]).mean() >= 0.995


def test_w8a16_is_torchs(scores, reference):
    expected = reference[1]["w8a16_float32"]
    assert scores["perplexity"]["w8a16_float32"] == pytest.approx(expected["perplexity"], rel=1e-3)
    assert scores["kl"]["w8a16_float32"] == pytest.approx(expected["kl"], rel=0.01)


def test_w8a8_is_torchs_but_for_ties(scores, reference):
    """Rounding activations is chaotic: a last bit that differs moves some to their neighbours.

    So two right implementations differ by more than float32's own error.
    """
    expected = reference[1]["w8a8_float32"]
    assert scores["perplexity"]["w8a8_float32"] == pytest.approx(expected["perplexity"], rel=0.01)
    assert scores["kl"]["w8a8_float32"] == pytest.approx(expected["kl"], rel=0.05)
