"""Write the tiny mixture-of-experts checkpoints of `moe/`, with the logits transformers gives them.

    python tests/golden/make_moe_golden.py        (needs torch and transformers)

Every `moe/<case>/` is an ordinary Hugging Face checkpoint in bfloat16 (`config.json`,
`model.safetensors` with one tensor per expert, as published checkpoints have them) and
`expected.npz`:

    tokens  int32    [2, 16]         the input
    logits  float32  [2, 16, vocab]  bfloat16 weights, float32 compute, eager attention and experts
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

GOLDEN = Path(__file__).parent / "moe"
BATCH, LENGTH = 2, 16
VOCAB = 96
# The least change of a logit that each feature of a case must make: else the case proves nothing.
EFFECT = 0.1
# The smallest lead of a chosen expert over the next: other summation orders do not flip it.
MARGIN = 1e-4

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 4,
    "beta_slow": 1,
    "original_max_position_embeddings": 64,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MLA = {
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "intermediate_size": 112,
    "moe_intermediate_size": 36,
    "first_k_dense_replace": 1,
}

# case -> (config, changes to it that must each change the logits)
CASES = {
    "mixtral": (
        MixtralConfig(
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=20,
            num_local_experts=6,
            num_experts_per_tok=2,
            rope_parameters=PLAIN_ROPE,
            **COMMON,
        ),
        [{"num_experts_per_tok": 1}],
    ),
    "qwen2_moe": (
        Qwen2MoeConfig(
            intermediate_size=112,
            moe_intermediate_size=36,
            shared_expert_intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=6,
            num_experts_per_tok=3,
            decoder_sparse_step=2,
            norm_topk_prob=False,
            rope_parameters=PLAIN_ROPE,
            **COMMON,
        ),
        [{"norm_topk_prob": True}],
    ),
    "qwen3_moe": (
        Qwen3MoeConfig(
            intermediate_size=112,
            moe_intermediate_size=36,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=48,
            num_experts=6,
            num_experts_per_tok=2,
            mlp_only_layers=[1],
            norm_topk_prob=True,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
            **COMMON,
        ),
        [{"norm_topk_prob": False}],
    ),
    "deepseek_v2": (
        DeepseekV2Config(
            num_hidden_layers=3,
            q_lora_rank=28,
            n_routed_experts=8,
            num_experts_per_tok=3,
            n_shared_experts=1,
            n_group=4,
            topk_group=2,
            topk_method="group_limited_greedy",
            routed_scaling_factor=4.0,
            rope_parameters={**YARN, "mscale": 1.2, "mscale_all_dim": 0.7},
            **MLA,
            **COMMON,
        ),
        [
            {"topk_method": "greedy"},
            {"routed_scaling_factor": 1.0},
            {"rope_parameters": {**YARN, "mscale": 1.2, "mscale_all_dim": 1.2}},
            {"rope_parameters": {**PLAIN_ROPE}},
        ],
    ),
    "deepseek_v2_lite": (
        DeepseekV2Config(
            num_hidden_layers=2,
            q_lora_rank=None,
            n_routed_experts=6,
            num_experts_per_tok=3,
            n_shared_experts=2,
            topk_method="greedy",
            rope_parameters={**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
            **MLA,
            **COMMON,
        ),
        [{"rope_parameters": {**YARN, "mscale": 0.0, "mscale_all_dim": 0.0}}],
    ),
    "deepseek_v3": (
        DeepseekV3Config(
            num_hidden_layers=3,
            q_lora_rank=28,
            n_routed_experts=8,
            num_experts_per_tok=3,
            n_shared_experts=1,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
            rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
            num_mtp_layers=0,
            **MLA,
            **COMMON,
        ),
        [{"topk_group": 4}, {"norm_topk_prob": False}, {"rope_interleave": False}],
    ),
    "glm4_moe": (
        Glm4MoeConfig(
            intermediate_size=112,
            moe_intermediate_size=36,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            n_routed_experts=6,
            num_experts_per_tok=2,
            n_shared_experts=1,
            first_k_dense_replace=1,
            routed_scaling_factor=2.5,
            use_qk_norm=True,
            attention_bias=True,
            num_mtp_layers=0,
            rope_parameters={**PLAIN_ROPE, "partial_rotary_factor": 0.5},
            **COMMON,
        ),
        [
            {"rope_parameters": {**PLAIN_ROPE, "partial_rotary_factor": 1.0}},
            {"routed_scaling_factor": 1.0},
        ],
    ),
}


def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Weights of a trained model's effect: attention that attends, routers that choose."""

    def normal(shape, std):
        return torch.randn(shape, generator=generator) * std

    with torch.no_grad():
        for name, x in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("norm.weight"):
                x.copy_(1.0 + normal(x.shape, 0.2))
            elif name.endswith("e_score_correction_bias"):
                x.copy_(normal(x.shape, 0.1))
            elif name.endswith("inv_freq"):
                continue
            elif name.endswith(".bias") or "embed_tokens" in name:
                x.copy_(normal(x.shape, 0.5))
            elif "gate.weight" in name or "q_" in name or "k_proj" in name:
                x.copy_(normal(x.shape, 1.7 * x.shape[-1] ** -0.5))
            else:
                x.copy_(normal(x.shape, 1.3 * x.shape[-1] ** -0.5))


def load(directory: Path, **changes) -> torch.nn.Module:
    config = AutoConfig.from_pretrained(directory)
    for key, value in changes.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    return model.eval()


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens).logits


def make(case: str, directory: Path, seed: int) -> str:
    config, changes = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    randomize(model, generator)
    model.to(torch.bfloat16).save_pretrained(directory)

    tokens = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=generator)
    model = load(directory)
    logits = logits_of(model, tokens)
    # A model in float64 routes alike, so no choice of experts is a near tie.
    assert torch.allclose(logits_of(model.double(), tokens), logits.double(), atol=MARGIN), case
    effects = [(logits_of(load(directory, **c), tokens) - logits).abs().max() for c in changes]
    for change, effect in zip(changes, effects, strict=True):
        assert effect > EFFECT, (case, change, effect)

    np.savez_compressed(
        directory / "expected.npz",
        tokens=tokens.numpy().astype(np.int32),
        logits=logits.numpy(),
    )
    (directory / "generation_config.json").unlink(missing_ok=True)
    size = (directory / "model.safetensors").stat().st_size
    assert size < 350_000, (case, size)
    shown = ", ".join(f"{effect:.2f}" for effect in effects)
    return f"{case:18} {size / 1000:5.0f} kB  logit std {logits.std():.2f}  effects {shown}"


def main() -> None:
    for seed, case in enumerate(CASES):
        directory = GOLDEN / case
        shutil.rmtree(directory, ignore_errors=True)
        print(make(case, directory, seed))


if __name__ == "__main__":
    main()
