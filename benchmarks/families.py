"""Runs a small random model of every family in FP8 on this device, and compares its logits.

    python benchmarks/families.py [CASE ...]    (default: all under tests/golden)

A case is the config of a golden checkpoint, with sizes that the kernels for GPUs take. Its logits
in BF16 on this device, of whole texts and of steps over a cache, are compared with those that a
CPU computes in float32 from the same FP8 weights; a CPU's own in BF16 show what rounding costs.
An error is the norm of the difference over that of the logits, the median of the tokens: of
experts, a near tie takes another for some token. The exit status is 1 if an error exceeds
1.5 times the CPU's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from safetensors.numpy import save_file

import jaxquant as jq
from jaxquant.models.fused import whole_name
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.registry import Family

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
CASES = sorted(str(path.parent.relative_to(GOLDEN)) for path in GOLDEN.glob("*/*/config.json"))
SIZES = {
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "head_dim": 128,
    "query_pre_attn_scalar": 128,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 256,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "qk_head_dim": 128,
    "v_head_dim": 64,
}
# The texts; of each, the last tokens are also decoded one by one over a cache.
BATCH, LENGTH, STEPS = 16, 64, 8
BATCHES = (1, BATCH)
ALLOWED = 1.5


def checkpoint(case: str, folder: Path) -> Path:
    """Writes the case's config with other sizes and random weights of a trained model's effect."""
    config = json.loads((GOLDEN / case / "config.json").read_text())
    config |= {k: size for k, size in SIZES.items() if config.get(k) is not None}
    if "kv_lora_rank" in config:
        config["head_dim"] = config["qk_rope_head_dim"]
    if config["model_type"] == "stablelm":  # an even number of dims
        config["rope_parameters"]["partial_rotary_factor"] = 0.5
    family = Family(HFConfig(config))
    shapes = {}
    for name, slot in family.slots().items():
        name, (rows, *rest) = whole_name(name, family.fused), slot.shape
        shapes[name] = (shapes.get(name, (0,))[0] + rows, *rest)
    rng, weights = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        x = rng.standard_normal(shape, np.float32)
        if "norm" in name and name.endswith(".weight"):
            x = 0.2 * x + (0 if "gemma" in case else 1)
        elif name.endswith("bias") or "embed" in name:
            x *= 0.1 if "correction" in name else 0.5
        else:
            x *= 1.3 * shape[-1] ** -0.5
        weights[name] = x.astype(ml_dtypes.bfloat16)
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def texts(vocab_size: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.integers(3, vocab_size, (BATCH, LENGTH), np.int32)


def load(folder: Path, dtype: Any = jnp.bfloat16) -> jq.LanguageModel:
    return jq.from_pretrained(folder, jq.QuantConfig(), dtype, progress=False)


@jax.jit
def decode_all(module, tokens):
    """Logits of the last tokens, by a prefill of what is before and a step for each."""
    B, start = tokens.shape[0], LENGTH - STEPS
    cache = module.empty_cache(B, LENGTH)
    _, cache = module.prefill(tokens, jnp.full((B,), start, jnp.int32), cache)

    def step(cache, ids):
        logits, cache = module.decode(ids, cache)
        return cache, logits

    return jnp.swapaxes(lax.scan(step, cache, tokens[:, start:].T)[1], 0, 1)


def error(logits: Any, expected: np.ndarray) -> float:
    difference = np.asarray(logits, np.float64) - expected
    norms = np.linalg.norm(difference, axis=-1) / np.linalg.norm(expected, axis=-1)
    return float(np.median(norms))


def write_expected(folder: Path) -> None:
    """In the process that has only a CPU."""
    model = load(folder, jnp.float32)
    tokens = texts(model.module.cfg.vocab_size)
    expected = np.asarray(model(tokens))
    partial = folder / "partial.npz"
    np.savez(partial, expected=expected, error=error(load(folder)(tokens), expected))
    partial.rename(folder / "expected.npz")


def compare(folder: Path, cpu: subprocess.Popen) -> dict[str, float]:
    """The errors by what was computed."""
    model = load(folder)
    tokens = texts(model.module.cfg.vocab_size)
    logits = {"texts": model(tokens)}
    for B in BATCHES:
        logits[f"steps of {B}"] = decode_all(model.module, tokens[:B])
    new = model.generate(tokens[:2], max_new_tokens=4, stop_tokens=())
    assert [len(ids) for ids in new] == [4, 4], new
    while not (path := folder / "expected.npz").exists():
        if cpu.poll() is not None and not path.exists():
            raise RuntimeError(f"the CPU's process ended, with status {cpu.returncode}")
        time.sleep(0.1)
    values = np.load(path)
    errors = {"CPU": float(values["error"])}
    for name, x in logits.items():
        errors[name] = error(x, values["expected"][: x.shape[0], -x.shape[1] :])
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", default=CASES, metavar="CASE")
    parser.add_argument("--expected", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.expected:
        with ThreadPoolExecutor() as pool:
            list(pool.map(write_expected, (args.expected / case for case in args.cases)))
        return
    names = ("CPU", "texts", *(f"steps of {B}" for B in BATCHES))
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor() as pool:
        folder = Path(temporary)
        for case in args.cases:
            checkpoint(case, folder / case)
        command = [sys.executable, __file__, *args.cases, "--expected", temporary]
        cpu = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"})
        print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n", flush=True)
        print(f"| case | {' | '.join(names)} | |\n{'|---' * (len(names) + 2)}|", flush=True)
        wrong = 0
        runs = {case: pool.submit(compare, folder / case, cpu) for case in args.cases}
        for case, run in runs.items():
            try:
                errors = run.result()
            except Exception as e:
                wrong += 1
                traceback.print_exception(e)
                print(f"| {case} | {type(e).__name__}: {e} |", flush=True)
                continue
            worst = max(errors.values()) / errors["CPU"]
            wrong += worst > ALLOWED
            cells = [*(f"{errors[name]:.4f}" for name in names), "" if worst <= ALLOWED else "!"]
            print(f"| {case} | {' | '.join(cells)} |", flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
