"""An ordinary BF16 Hugging Face checkpoint made from a GGUF file, for the demo model.

The demo's model, SmolLM2-135M-Instruct, comes from the Python package index as a GGUF file inside
a wheel. `materialize` turns it into what Hugging Face hosts: `config.json`, `model.safetensors`,
`tokenizer.json` and their companions. GGUF files of other Llama models with the same tokenizer
are read too; anything else is refused.
"""

import json
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float
from safetensors.numpy import save_file

from jaxquant.errors import JaxquantError

# GGUF's name -> Hugging Face's.
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_HEAD_NAME = {"output.weight": "lm_head.weight"}  # absent where the embeddings are tied
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# GGUF's token types: matched in the text before merging; a control token is not printed.
_CONTROL, _USER_DEFINED = 3, 4

_SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}

# SmolLM2's own, for a file that carries none.
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def materialize(source: Path, directory: Path) -> Path:
    """Write the model in `source` as a BF16 Hugging Face checkpoint to `directory`, once.

    Quantized GGUF tensors are dequantized in float32 and rounded to nearest even; all else is
    kept. The directory appears whole or not at all; where it is already there, nothing is done
    and `source` is not read.

    Args:
        source: a `.gguf` file, or a wheel (`.whl`) with exactly one inside.
        directory: the checkpoint folder to make; its parents are made too.

    Returns:
        `directory`.

    Raises:
        JaxquantError: a source that is missing, truncated, without a GGUF file or of another
            architecture or tokenizer; a `directory` that holds something else; the package `gguf`
            not installed.
    """
    source, directory = Path(source), Path(directory)
    if (directory / "config.json").is_file():
        return directory
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise JaxquantError(
            f"{directory} exists and is not a checkpoint (no config.json); "
            "give another directory or remove it"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, so that the rename stays on one file system and is atomic.
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        checkpoint = temporary / "checkpoint"
        checkpoint.mkdir()
        model = _Gguf(_gguf_file(source, temporary), label=str(source))
        _write_json(checkpoint / "config.json", _config(model))
        _write_json(checkpoint / "generation_config.json", _generation_config(model))
        _write_json(checkpoint / "tokenizer.json", _tokenizer(model))
        _write_json(checkpoint / "tokenizer_config.json", _tokenizer_config(model))
        _write_json(checkpoint / "special_tokens_map.json", _special_tokens_map(model))
        save_file(
            dict(_tensors(model)), checkpoint / "model.safetensors", metadata={"format": "pt"}
        )
        try:
            checkpoint.replace(directory)
        except OSError:
            # Another process was faster: its checkpoint is the same.
            if not (directory / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def _gguf_file(source: Path, scratch: Path) -> Path:
    """The GGUF file itself; one inside a wheel is unpacked into `scratch`."""
    if not source.is_file():
        raise JaxquantError(f"{source} does not exist; expected a .whl or .gguf file")
    if source.suffix == ".gguf":
        return source
    if source.suffix != ".whl":
        raise JaxquantError(f"{source} is neither a .whl nor a .gguf file")
    unpacked = scratch / "model.gguf"
    try:
        with zipfile.ZipFile(source) as wheel:
            members = [name for name in wheel.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                found = ", ".join(members) if members else "none"
                raise JaxquantError(f"{source}: expected one .gguf file inside, found {found}")
            with wheel.open(members[0]) as packed, unpacked.open("wb") as out:
                shutil.copyfileobj(packed, out, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise JaxquantError(
            f"{source} is not a whole wheel ({error}); download it again"
        ) from error
    return unpacked


class _Gguf:
    """A Llama model in a GGUF file: metadata by key, tensors by name, dequantized on demand."""

    def __init__(self, path: Path, label: str):
        try:
            import gguf
        except ImportError as error:
            raise JaxquantError(
                "reading a GGUF file needs the package gguf: pip install jaxquant[demo]"
            ) from error
        self.label = label
        self._dequantize = gguf.dequantize
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, struct.error) as error:
            raise JaxquantError(
                f"{label} is truncated or not a GGUF file ({error}); download it again"
            ) from error
        self._fields = reader.fields
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        architecture = self["general.architecture"]
        if architecture != "llama":
            raise JaxquantError(
                f"{label}: general.architecture is {architecture!r}; only 'llama' is read"
            )

    def __getitem__(self, key: str) -> Any:
        if key not in self._fields:
            raise JaxquantError(f"{self.label}: the GGUF metadata lack {key!r}")
        return self._fields[key].contents()

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self._fields else default

    def tensor(self, name: str) -> Float[np.ndarray, "..."]:
        """The tensor in float32, in row-major `[out, in]` order."""
        tensor = self.tensors[name]
        return self._dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)

    @property
    def tied(self) -> bool:
        return "output.weight" not in self.tensors


def _config(model: _Gguf) -> dict[str, Any]:
    heads = model["llama.attention.head_count"]
    hidden = model["llama.embedding_length"]
    scaling = model.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise JaxquantError(
            f"{model.label}: llama.rope.scaling.type is {scaling!r}; only 'none' is read"
        )
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": model["llama.feed_forward_length"],
        "max_position_embeddings": model["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": model["llama.block_count"],
        "num_key_value_heads": model.get("llama.attention.head_count_kv", heads),
        "rms_norm_eps": _shortest(model["llama.attention.layer_norm_rms_epsilon"]),
        "rope_scaling": None,
        "rope_theta": _shortest(model.get("llama.rope.freq_base", 10000.0)),
        "tie_word_embeddings": model.tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": len(model["tokenizer.ggml.tokens"]),
    }
    head_dim = model.get("llama.attention.key_length", hidden // heads)
    if head_dim * heads != hidden:
        config["head_dim"] = head_dim
    return config | _token_ids(model)


def _generation_config(model: _Gguf) -> dict[str, Any]:
    return {"_from_model_config": True} | _token_ids(model)


def _token_ids(model: _Gguf) -> dict[str, int]:
    ids = {
        "bos_token_id": model["tokenizer.ggml.bos_token_id"],
        "eos_token_id": model["tokenizer.ggml.eos_token_id"],
    }
    pad = model.get("tokenizer.ggml.padding_token_id")
    return ids if pad is None else ids | {"pad_token_id": pad}


def _shortest(value: float) -> float:
    """The decimal that was meant by a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _tensors(model: _Gguf) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor under its Hugging Face name, in bfloat16."""
    config = _config(model)
    names = _names(model, config["num_hidden_layers"])
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    for name, hf_name in names.items():
        value = model.tensor(name)
        for part, count in heads.items():
            if f".{part}." in name:
                value = _undo_rope_permutation(value, count)
        yield hf_name, np.ascontiguousarray(value.astype(ml_dtypes.bfloat16))


def _names(model: _Gguf, num_layers: int) -> dict[str, str]:
    """GGUF name -> Hugging Face name of every tensor the model must have, and has."""
    names = dict(_TOP_NAMES)
    if not model.tied:
        names |= _HEAD_NAME
    for layer in range(num_layers):
        for part, hf_part in _LAYER_NAMES.items():
            names[f"blk.{layer}.{part}.weight"] = f"model.layers.{layer}.{hf_part}.weight"
    for problem, odd in (
        ("lacks", sorted(names.keys() - model.tensors.keys())),
        ("has the unexpected", sorted(model.tensors.keys() - names.keys())),
    ):
        if odd:
            more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
            raise JaxquantError(f"{model.label} {problem} tensor {odd[0]!r}{more}")
    return names


def _undo_rope_permutation(
    weight: Float[np.ndarray, "out in"], num_heads: int
) -> Float[np.ndarray, "out in"]:
    """Back to Hugging Face's rows of q and k.

    Hugging Face rotates dimension i of a head with i + head_dim / 2, GGUF rotates 2i with 2i + 1:
    its rows are interleaved from the two halves of each head.
    """
    out, in_ = weight.shape
    pairs = weight.reshape(num_heads, out // num_heads // 2, 2, in_)
    return pairs.swapaxes(1, 2).reshape(out, in_)


def _tokenizer(model: _Gguf) -> dict[str, Any]:
    """`tokenizer.json`: byte-level BPE that splits digits one by one, as SmolLM2's."""
    kind = (model["tokenizer.ggml.model"], model["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise JaxquantError(
            f"{model.label}: tokenizer.ggml.model and .pre are {kind[0]!r} and {kind[1]!r}; "
            "only 'gpt2' and 'smollm' (SmolLM2's byte-level BPE) are read"
        )
    tokens = model["tokenizer.ggml.tokens"]
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id_} | token for id_, token in _added_tokens(model).items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                byte_level | {"add_prefix_space": False},
            ],
        },
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: id_ for id_, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in model["tokenizer.ggml.merges"]],
        },
    }


def _added_tokens(model: _Gguf) -> dict[int, dict[str, Any]]:
    """Id -> the token's entry in `tokenizer.json`, for the tokens matched before merging."""
    tokens = model["tokenizer.ggml.tokens"]
    return {
        id_: _exact(tokens[id_]) | {"special": type_ == _CONTROL}
        for id_, type_ in enumerate(model["tokenizer.ggml.token_type"])
        if type_ in (_CONTROL, _USER_DEFINED)
    }


def _exact(content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": content} | flags


def _named_special_tokens(model: _Gguf) -> dict[str, str]:
    """`bos_token`, `eos_token`, ... -> the token, for those that the file names."""
    tokens = model["tokenizer.ggml.tokens"]
    ids = {name: model.get(f"tokenizer.ggml.{key}") for name, key in _SPECIAL_TOKENS.items()}
    return {name: tokens[id_] for name, id_ in ids.items() if id_ is not None}


def _tokenizer_config(model: _Gguf) -> dict[str, Any]:
    named = _named_special_tokens(model)
    return named | {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(id_): t for id_, t in _added_tokens(model).items()},
        "additional_special_tokens": [named["bos_token"], named["eos_token"]],
        "chat_template": model.get("tokenizer.chat_template", _CHAT_TEMPLATE),
        "clean_up_tokenization_spaces": False,
        "model_max_length": model["llama.context_length"],
        # Not GPT2Tokenizer: transformers 5 would replace the pre-tokenizer and lose the digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _special_tokens_map(model: _Gguf) -> dict[str, Any]:
    named = _named_special_tokens(model)
    return {"additional_special_tokens": [named["bos_token"], named["eos_token"]]} | {
        name: _exact(token) for name, token in named.items()
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
