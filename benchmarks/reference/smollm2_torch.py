"""What torch and transformers say about SmolLM2-135M-Instruct: the figures jaxquant is held to.

    python benchmarks/reference/smollm2_torch.py accuracy MODEL_DIRECTORY
    python benchmarks/reference/smollm2_torch.py speed MODEL_DIRECTORY

needs torch and transformers. `MODEL_DIRECTORY` is what `jaxquant.demo.checkpoint.materialize`
writes. `accuracy` writes tests/golden/smollm2_reference.npz and, as `speed` does, its part of
tests/golden/smollm2_reference.json, where every figure stands beside its definition.

The blocked FP8 recipe is jaxquant's, written again in torch: weights of every q, k, v, o, gate, up
and down projection in float8_e4m3fn with one float32 scale per 128 x 128 block; activations, for
W8A8, in float8_e4m3fn with one float32 scale per token and 128 values. Everything is multiplied
out in float32, so what is left is the error of the format and none of a kernel.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "jaxquant" / "data" / "alice.txt"
JSON = ROOT / "tests" / "golden" / "smollm2_reference.json"
NPZ = ROOT / "tests" / "golden" / "smollm2_reference.npz"

NUM_TOKENS, WINDOW = 4096, 1024
BLOCK, FMAX = 128, 448.0
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPT, NEW, REPEATS, THREADS = 32, 64, 3, 2

DEFINITIONS = {
    "windows": f"the first {NUM_TOKENS} tokens of the text (no special tokens added) as "
    f"{NUM_TOKENS // WINDOW} windows of {WINDOW}, each run from position 0 with no context before",
    "perplexity": "exp of the mean negative log likelihood, in nats, of every token but the first "
    f"of its window: {NUM_TOKENS // WINDOW} x {WINDOW - 1} = "
    f"{NUM_TOKENS // WINDOW * (WINDOW - 1)} tokens",
    "kl": "mean of KL(float32 || this) in nats over the distributions that predict those tokens",
    "argmax_agreement": "share of those distributions with float32's most likely token",
    "float32": "the bfloat16 weights, float32 compute, eager attention",
    "bfloat16": "the bfloat16 weights, bfloat16 compute, eager attention",
    "w8a16_float32": "FP8 projections, weight = qvalue * scale in float32, float32 compute",
    "w8a16_rounded": "the same, weight = bfloat16(qvalue * scale), float32 compute",
    "w8a16_bfloat16": "the same, weight = bfloat16(qvalue * scale), bfloat16 compute",
    "w8a8_float32": "FP8 projections and FP8 activations going into them, all multiplied out in "
    "float32, float32 compute",
}


def quantize_dequantize(
    x: torch.Tensor, block: tuple[int, int], floor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` [rows, columns] through float8_e4m3fn: (qvalue, scale of each element), both float32."""
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, -columns % block[1], 0, -rows % block[0]))
    tiles = padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))
    scale = tiles.abs().amax(dim=(1, 3), keepdim=True).clamp(min=floor) / FMAX
    scale = scale.expand(tiles.shape).reshape(padded.shape)[:rows, :columns]
    qvalue = (x.float() / scale).clamp(-FMAX, FMAX).to(torch.float8_e4m3fn).float()
    return qvalue, scale


def fp8_weight(weight: torch.Tensor) -> torch.Tensor:
    qvalue, scale = quantize_dequantize(weight, (BLOCK, BLOCK), 1e-6)
    return qvalue * scale


def fp8_activations(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    (x,) = inputs
    qvalue, scale = quantize_dequantize(x.flatten(0, -2), (1, BLOCK), 1e-10)
    return (qvalue * scale).reshape(x.shape)


def projections(model: torch.nn.Module) -> list[torch.nn.Linear]:
    return [m for name, m in model.named_modules() if name.endswith(PROJECTIONS)]


def with_fp8(model: torch.nn.Module, dtype: torch.dtype, activations: bool) -> torch.nn.Module:
    """A copy with FP8 projections, their weights multiplied out and rounded to `dtype`."""
    model = copy.deepcopy(model)
    for linear in projections(model):
        linear.weight.data = fp8_weight(linear.weight.data).to(dtype).float()
        if activations:
            linear.register_forward_pre_hook(fp8_activations)
    return model


def load(directory: Path, dtype: torch.dtype, **options) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options).eval()


def text_tokens(directory: Path) -> torch.Tensor:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False).ids
    if len(ids) < NUM_TOKENS:
        raise SystemExit(f"{TEXT} has {len(ids)} tokens, {NUM_TOKENS} are needed")
    return torch.tensor(ids[:NUM_TOKENS]).reshape(-1, WINDOW)


@torch.no_grad()
def accuracy(directory: Path) -> dict:
    tokens = text_tokens(directory)
    float32 = load(directory, torch.float32, attn_implementation="eager")
    models = {
        "float32": float32,
        "bfloat16": load(directory, torch.bfloat16, attn_implementation="eager"),
        "w8a16_float32": with_fp8(float32, torch.float32, activations=False),
        "w8a16_rounded": with_fp8(float32, torch.bfloat16, activations=False),
        "w8a8_float32": with_fp8(float32, torch.float32, activations=True),
    }
    models["w8a16_bfloat16"] = copy.deepcopy(models["w8a16_rounded"]).to(torch.bfloat16)
    sums = {name: {"nll": 0.0, "kl": 0.0, "agree": 0} for name in models}
    argmax, margin = [], []
    for window in tokens:
        reference = None
        for name, model in models.items():
            logits = model(window[None]).logits[0].float()
            if reference is None:
                best = logits.topk(2)
                argmax.append(best.indices[:, 0])
                margin.append(best.values[:, 0] - best.values[:, 1])
            log_p = logits[:-1].double().log_softmax(-1)
            if reference is None:
                reference = log_p
            sums[name]["nll"] -= log_p.gather(1, window[1:, None]).sum().item()
            sums[name]["kl"] += (reference.exp() * (reference - log_p)).sum().item()
            sums[name]["agree"] += (reference.argmax(-1) == log_p.argmax(-1)).sum().item()
    count = tokens.shape[0] * (WINDOW - 1)
    np.savez_compressed(
        NPZ,
        tokens=tokens.numpy().astype(np.int32),
        argmax=torch.stack(argmax).numpy().astype(np.int32),
        margin=torch.stack(margin).numpy().astype(np.float16),
    )
    relative_error = [
        ((fp8_weight(m.weight) - m.weight).norm() / m.weight.norm()).item()
        for m in projections(float32)
    ]
    return {
        "definitions": DEFINITIONS,
        "text": TEXT.name,
        "quantized_projections": len(relative_error),
        "weight_relative_error": {
            "mean": statistics.mean(relative_error),
            "max": max(relative_error),
        },
        "accuracy": {
            name: {
                "perplexity": float(np.exp(value["nll"] / count)),
                "kl": value["kl"] / count,
                "argmax_agreement": value["agree"] / count,
            }
            for name, value in sums.items()
        },
    }


@torch.no_grad()
def speed(directory: Path) -> dict:
    torch.set_num_threads(THREADS)
    prompt = text_tokens(directory)[:1, :PROMPT]

    def seconds(model: torch.nn.Module, new: int) -> float:
        start = time.perf_counter()
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=new,
        )
        assert out.shape[1] == PROMPT + new
        return time.perf_counter() - start

    figures = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = load(directory, dtype)
        model.generation_config.eos_token_id = None
        seconds(model, NEW)  # warm up
        whole, decode = [], []
        for _ in range(REPEATS):
            first, total = seconds(model, 1), seconds(model, NEW)
            whole.append(NEW / total)
            decode.append((NEW - 1) / (total - first))
        figures[name] = {
            "generate_tokens_per_s": summary(whole),
            "decode_tokens_per_s": summary(decode),
        }
    return {
        "decode_speed": {
            "definition": f"greedy, batch 1, prompt of {PROMPT} tokens, {NEW} new tokens, "
            f"{THREADS} threads, sdpa attention; generate: {NEW} / seconds of generate(); decode: "
            f"{NEW - 1} / (seconds of generate() - seconds of generating one token); "
            f"{REPEATS} repeats after one warm-up",
            "cpu": cpu_name(),
            **figures,
        }
    }


def summary(values: list[float]) -> dict[str, float]:
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {key: round(value, 2) for key, value in figures.items()}


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(": ")[1] for line in lines if line.startswith("model name"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("accuracy", "speed"))
    parser.add_argument("model", type=Path)
    arguments = parser.parse_args()
    figures = {"accuracy": accuracy, "speed": speed}[arguments.what](arguments.model)
    known = json.loads(JSON.read_text()) if JSON.exists() else {}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    JSON.write_text(json.dumps(known | figures | {"versions": versions}, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
