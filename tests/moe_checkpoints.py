"""The tiny golden checkpoints with experts, and other layouts of the same weights."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import builders
import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "moe"
CASES = sorted(path.name for path in GOLDEN.iterdir())
BLOCK = 32
_DTYPES = {"BF16": builders.BF16, "F32": np.dtype(np.float32), "F8_E4M3": builders.E4M3}

Weights = dict[str, np.ndarray]


def expected(case: str) -> Mapping[str, np.ndarray]:
    return np.load(GOLDEN / case / "expected.npz")


def weights(folder: Path) -> Weights:
    return {
        name: np.frombuffer(data, _DTYPES[dtype]).reshape(shape)
        for name, (dtype, shape, data) in builders.load(folder).items()
    }


def variant(case: str, folder: Path, change: Callable[[Weights], Weights], **config) -> Path:
    """A golden checkpoint with other weights and other fields of its config."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(GOLDEN / case / "config.json", folder)
    builders.edit_json(folder / "config.json", **config)
    builders.save(folder / "model.safetensors", change(weights(GOLDEN / case)))
    return folder


def is_projection(name: str) -> bool:
    *_, module, kind = name.split(".")
    return kind == "weight" and ("_proj" in module or module in ("w1", "w2", "w3"))


def to_fp8(
    tensors: Weights,
    *,
    suffix: str = ".weight_scale_inv",
    dtype=np.float32,
    powers_of_two: bool = False,
) -> Weights:
    """Projections as e4m3 with one scale per block, and the scales."""
    result = {}
    for name, w in tensors.items():
        result[name] = w
        if is_projection(name):
            q, scale = quantize(w.astype(np.float32), powers_of_two=powers_of_two)
            result[name] = q
            result[name.removesuffix(".weight") + suffix] = scale.astype(dtype)
    return result


def quantize(w: np.ndarray, *, powers_of_two: bool = False) -> tuple[np.ndarray, np.ndarray]:
    no, ni = (-(-size // BLOCK) for size in w.shape)
    padded = np.zeros((no * BLOCK, ni * BLOCK), np.float32)
    padded[: w.shape[0], : w.shape[1]] = w
    scale = np.abs(padded).reshape(no, BLOCK, ni, BLOCK).max((1, 3)) / np.float32(448)
    if powers_of_two:
        scale = np.exp2(np.ceil(np.log2(scale))).astype(np.float32)
    q = (padded / expand(scale, padded.shape)).astype(builders.E4M3)
    return q[: w.shape[0], : w.shape[1]], scale


def expand(scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    full = np.repeat(np.repeat(scale.astype(np.float32), BLOCK, 0), BLOCK, 1)
    return full[: shape[0], : shape[1]]


def stacked(tensors: Weights) -> Weights:
    """Experts as transformers 5 stacks them: `experts.gate_up_proj` and `experts.down_proj`."""
    result, experts = {}, {}
    for name, w in tensors.items():
        name = name.replace(".block_sparse_moe.", ".mlp.")
        if ".experts." not in name:
            result[name] = w
            continue
        module, rest = name.split(".experts.")
        number, part, _ = rest.split(".")
        experts.setdefault(module, {}).setdefault(int(number), {})[part] = w
    for module, found in experts.items():
        parts = ("w1", "w3", "w2") if "w1" in found[0] else ("gate_proj", "up_proj", "down_proj")
        each = [[found[e][part] for part in parts] for e in range(len(found))]
        gate_up = [np.concatenate([gate, up]) for gate, up, _ in each]
        result[f"{module}.experts.gate_up_proj"] = np.stack(gate_up)
        result[f"{module}.experts.down_proj"] = np.stack([down for *_, down in each])
    return result
