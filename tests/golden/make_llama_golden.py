"""Write the tiny Llama-family checkpoints of `llama/`, with the logits transformers gives them.

    python tests/golden/make_llama_golden.py        (needs torch and transformers)

Every `llama/<case>/` is an ordinary Hugging Face checkpoint in bfloat16 (`config.json`,
`generation_config.json`, `model.safetensors`) and `expected.npz`:

    tokens  int32    [2, 24]         the input
    logits  float32  [2, 24, vocab]  bfloat16 weights, float32 compute, eager attention
    greedy  int32    [2, 12]         the greedy continuation of `tokens`, end of text ignored

`config.json` is what transformers 5 writes (`rope_parameters`, `dtype`). Cases with a
`config_v4.json` have the same config as older releases wrote it (`rope_theta`, `rope_scaling`,
`torch_dtype`), which is what most published checkpoints carry.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig

GOLDEN = Path(__file__).parent / "llama"
BATCH, PROMPT, NEW = 2, 24, 12
VOCAB = 128
# The smallest lead of a greedy token over the next best: other summation orders do not flip it.
MARGIN = 0.05
# The least change of a logit that a case's own feature must make: else the case proves nothing.
EFFECT = 0.3

COMMON = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
    "use_cache": True,
}


def rope(theta: float, rope_type: str = "default", **parameters: float) -> dict:
    return {"rope_theta": theta, "rope_type": rope_type, **parameters}


LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # With head_dim 48 and theta 500000 the wavelengths are 6.3, 10.9, 18.7, 32.4, ...: the first
    # is below 32 / 4 (kept), the next two up to 32 / 1 (interpolated), the rest above (scaled).
    "original_max_position_embeddings": 32,
}

# case -> (config, the same config without the case's own feature)
CASES = {
    "llama2": (
        LlamaConfig(
            hidden_size=64,
            intermediate_size=176,
            num_attention_heads=4,
            num_key_value_heads=4,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            rope_parameters=rope(10000.0),
            **COMMON,
        ),
        {"rope_parameters": rope(500.0)},
    ),
    "llama3": (
        LlamaConfig(
            hidden_size=30,
            intermediate_size=448,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=48,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            rope_parameters=rope(500000.0, "llama3", **LLAMA3_ROPE),
            **COMMON,
        ),
        {"rope_parameters": rope(500000.0)},
    ),
    "llama_linear_rope": (
        LlamaConfig(
            hidden_size=64,
            intermediate_size=176,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
            rope_parameters=rope(10000.0, "linear", factor=2.0),
            **COMMON,
        ),
        {"rope_parameters": rope(10000.0)},
    ),
    "mistral": (
        MistralConfig(
            hidden_size=64,
            intermediate_size=176,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            rms_norm_eps=1e-5,
            sliding_window=7,
            tie_word_embeddings=False,
            rope_parameters=rope(10000.0),
            **COMMON,
        ),
        {"sliding_window": None},
    ),
    "llama_bias": (
        LlamaConfig(
            hidden_size=64,
            intermediate_size=176,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
            rope_parameters=rope(10000.0),
            **COMMON,
        ),
        None,  # shown by zeroing the biases
    ),
}

# What older releases call the scaling: "type" until Llama 3.1, then "rope_type".
V4_ROPE_TYPE_KEY = {"llama3": "rope_type", "llama_linear_rope": "type"}


def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Weights of a trained model's effect: attention that attends, logits of a few units."""

    def normal(shape, std):
        return torch.randn(shape, generator=generator) * std

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = parameter.shape
            if name.endswith("norm.weight"):
                value = 1.0 + normal(shape, 0.2)
            elif name.endswith(".bias") or "embed_tokens" in name:
                value = normal(shape, 0.5)
            elif "q_proj" in name or "k_proj" in name:
                value = normal(shape, 1.7 * shape[1] ** -0.5)
            else:
                value = normal(shape, 1.3 * shape[1] ** -0.5)
            parameter.copy_(value)


def load(directory: Path, config=None) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(
        directory, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens).logits


@torch.no_grad()
def greedy_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    model.generation_config.eos_token_id = None
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=NEW,
        pad_token_id=0,
    )
    # The cache changes nothing, and no token is a near tie.
    full = logits_of(model, out)[:, tokens.shape[1] - 1 : -1]
    assert torch.equal(full.argmax(-1), out[:, tokens.shape[1] :])
    best = full.topk(2, dim=-1).values
    if (best[..., 0] - best[..., 1]).min() < MARGIN:
        raise ValueError("near tie")
    return out[:, tokens.shape[1] :]


def v4_config(config: dict, rope_type_key: str) -> dict:
    old = {k: v for k, v in config.items() if k not in ("rope_parameters", "dtype")}
    scaling = dict(config["rope_parameters"])
    old["rope_theta"] = scaling.pop("rope_theta")
    old["rope_scaling"] = {rope_type_key: scaling.pop("rope_type"), **scaling}
    old["torch_dtype"] = config["dtype"]
    old["transformers_version"] = "4.43.0"
    if rope_type_key == "type":  # of a time before these keys
        for key in ("attention_bias", "head_dim", "mlp_bias"):
            del old[key]
    return dict(sorted(old.items()))


def without_feature(directory: Path, change: dict | None) -> torch.nn.Module:
    if change is not None:
        config = AutoConfig.from_pretrained(directory)
        for key, value in change.items():
            setattr(config, key, value)
        return load(directory, config)
    model = load(directory)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
    return model


def make(case: str, directory: Path, seed: int) -> str:
    config, change = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    randomize(model, generator)
    model.to(torch.bfloat16).save_pretrained(directory)

    tokens = torch.randint(3, VOCAB, (BATCH, PROMPT), generator=generator)
    model = load(directory)
    logits = logits_of(model, tokens)
    greedy = greedy_of(model, tokens)
    effect = (logits_of(without_feature(directory, change), tokens) - logits).abs().max()
    assert effect > EFFECT, (case, effect)

    if case in V4_ROPE_TYPE_KEY:
        path = directory / "config.json"
        v4 = v4_config(json.loads(path.read_text()), V4_ROPE_TYPE_KEY[case])
        (directory / "config_v4.json").write_text(json.dumps(v4, indent=2) + "\n")
        with tempfile.TemporaryDirectory() as temporary:
            shutil.copy(directory / "config_v4.json", f"{temporary}/config.json")
            old = load(directory, AutoConfig.from_pretrained(temporary))
        assert torch.equal(logits_of(old, tokens), logits)

    np.savez_compressed(
        directory / "expected.npz",
        tokens=tokens.numpy().astype(np.int32),
        logits=logits.numpy(),
        greedy=greedy.numpy().astype(np.int32),
    )
    size = (directory / "model.safetensors").stat().st_size
    assert size < 300_000, (case, size)
    return (
        f"{case:18} seed {seed:3}  {size / 1000:5.0f} kB  logit std {logits.std():.2f}"
        f"  effect of the feature {effect:.2f}"
    )


def main() -> None:
    for number, case in enumerate(CASES):
        directory = GOLDEN / case
        for seed in range(100 * number, 100 * number + 100):
            shutil.rmtree(directory, ignore_errors=True)
            try:
                print(make(case, directory, seed))
            except ValueError as error:
                if str(error) != "near tie":
                    raise
                continue
            break
        else:
            raise SystemExit(f"{case}: no seed without a near tie")


if __name__ == "__main__":
    main()
