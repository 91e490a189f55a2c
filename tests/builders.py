"""Tiny Llama checkpoints for tests: names, shapes and files written by hand, not by the package."""

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import jaxquant as jq

BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
_DTYPE_NAMES = {
    BF16: "BF16",
    E4M3: "F8_E4M3",
    E8M0: "F8_E8M0",
    np.dtype(np.float16): "F16",
    np.dtype(np.float32): "F32",
    np.dtype(np.int64): "I64",
}

BLOCK = 32
BLOCKS = (BLOCK, BLOCK)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 257,
    "torch_dtype": "bfloat16",
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def shapes(config: Mapping[str, Any] = CONFIG) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a Llama without biases."""
    K, wide, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    D = config.get("head_dim") or K // config["num_attention_heads"]
    q, kv = D * config["num_attention_heads"], D * config["num_key_value_heads"]
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, K)}
    for l in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm": (K,),
            "self_attn.q_proj": (q, K),
            "self_attn.k_proj": (kv, K),
            "self_attn.v_proj": (kv, K),
            "self_attn.o_proj": (K, q),
            "post_attention_layernorm": (K,),
            "mlp.gate_proj": (wide, K),
            "mlp.up_proj": (wide, K),
            "mlp.down_proj": (K, wide),
        }
        result |= {f"model.layers.{l}.{name}.weight": shape for name, shape in layer.items()}
    result["model.norm.weight"] = (K,)
    if not config["tie_word_embeddings"]:
        result["lm_head.weight"] = (V, K)
    return result


def tensors(config: Mapping[str, Any] = CONFIG, dtype: np.dtype = BF16) -> dict[str, np.ndarray]:
    """Random weights of a trained model's effect."""
    rng = np.random.default_rng(0)
    result = {}
    for name, shape in shapes(config).items():
        x = rng.standard_normal(shape, np.float32)
        x = 1 + 0.1 * x if len(shape) == 1 else x * 1.3 / np.sqrt(shape[1])
        result[name] = x.astype(BF16).astype(dtype)
    return result


def is_projection(name: str) -> bool:
    return name.split(".")[-2] in PROJECTIONS


def save(path: Path, weights: Mapping[str, np.ndarray]) -> None:
    """A safetensors file."""
    header, offset = {}, 0
    for name, x in weights.items():
        header[name] = {
            "dtype": _DTYPE_NAMES[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [offset, offset + x.nbytes],
        }
        offset += x.nbytes
    save_raw(path, json.dumps(header).encode(), b"".join(x.tobytes() for x in weights.values()))


def save_raw(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def load(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Name -> (dtype, shape, bytes) of every tensor of a folder."""
    result = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:start]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                data = content[start + begin : start + end]
                result[name] = (entry["dtype"], entry["shape"], data)
    return result


def checkpoint(
    folder: Path,
    weights: Mapping[str, np.ndarray] | None = None,
    *,
    shards: int = 1,
    tokenizer: bool = False,
    chat_template: str | None = None,
    config: Mapping[str, Any] = CONFIG,
    **changes: Any,
) -> Path:
    """Writes a checkpoint folder.

    Args:
      folder: where.
      weights: default `tensors(config)`.
      shards: more than one are dealt the tensors in turn, and an index.
      tokenizer: whether there is one.
      chat_template: its template.
      config: of config.json.
      **changes: to the config.
    """
    config = {**config, **changes}
    weights = tensors(config) if weights is None else weights
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save(folder / "model.safetensors", weights)
    else:
        files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        for i, file in enumerate(files):
            save(folder / file, {name: weights[name] for name in list(weights)[i::shards]})
        weight_map = {name: files[i % shards] for i, name in enumerate(weights)}
        write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    write_json(folder / "config.json", config)
    if tokenizer:
        byte_tokenizer().save(str(folder / "tokenizer.json"))
        tokenizer_config = {"eos_token": "<|im_end|>"}
        if chat_template is not None:
            tokenizer_config["chat_template"] = chat_template
        write_json(folder / "tokenizer_config.json", tokenizer_config)
    return folder


def fp8_weights(
    weights: Mapping[str, np.ndarray], block: int = BLOCK, *, ue8m0: bool = False
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Projections as e4m3 with one scale per block, in numpy: (all weights, scales by name)."""
    result, scales = dict(weights), {}
    for name, w in weights.items():
        if not is_projection(name):
            continue
        no, ni = (-(-size // block) for size in w.shape)
        padded = np.zeros((no * block, ni * block), np.float32)
        padded[: w.shape[0], : w.shape[1]] = w
        amax = np.abs(padded).reshape(no, block, ni, block).max((1, 3))
        scale = amax / np.float32(448)
        if ue8m0:
            scale = np.exp2(np.ceil(np.log2(scale)))
        full = np.repeat(np.repeat(scale, block, 0), block, 1)
        result[name] = (padded / full).astype(E4M3)[: w.shape[0], : w.shape[1]]
        scales[name] = scale.astype(np.float32)
    return result, scales


def byte_tokenizer() -> tokenizers.Tokenizer:
    """One token per byte, 0 to 255 in an order of its own, then <|im_start|> and <|im_end|>."""
    vocab = {
        character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return backend


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2))


def edit_json(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON object; None removes them."""
    value = {**json.loads(path.read_text()), **changes}
    write_json(path, {k: v for k, v in value.items() if v is not None})


@functools.cache
def tiny_checkpoint() -> Path:
    """One checkpoint with a tokenizer, for tests that only read it."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    return checkpoint(folder, tokenizer=True)


@functools.cache
def tiny_model() -> jq.LanguageModel:
    """It, loaded in float32; the same object each time, so that it is compiled once per shape."""
    return jq.from_pretrained(tiny_checkpoint(), dtype=np.float32)


def full_of_nan(shape: tuple[int, ...], dtype: Any) -> Any:
    """What memory may hold that nothing has been written to; bytes are NaN in FP8."""
    value = 0x7F if jnp.dtype(dtype) == jnp.uint8 else jnp.nan
    return jnp.full(shape, value, dtype)
