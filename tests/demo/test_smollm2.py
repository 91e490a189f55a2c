"""The real demo checkpoint: what `materialize` made of SmolLM2-135M-Instruct."""

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer

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
