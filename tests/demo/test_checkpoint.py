import json
import sys
import zipfile
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf.quants import quantize
from tokenizers import Tokenizer

from jaxquant.demo.checkpoint import materialize
from jaxquant.errors import JaxquantError

HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 2, 4, 2, 16
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Bytes as the byte-level alphabet writes them: a space is Ġ, a line feed Ċ.
LETTERS = [*"abcdefghijklmnopqrstuvwxyz0123456789", "Ġ", "Ċ"]
MERGES = ["Ġ Ġ", "a b", "ab c", "1 2", "Ġ a"]
TOKENS = [*SPECIAL, *LETTERS, *(merge.replace(" ", "") for merge in MERGES), "<user>"]

HF_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def rope_interleaved(weight, num_heads):
    """The permutation that conversion to GGUF applies to the rows of q and k, row by row."""
    head_dim = weight.shape[0] // num_heads
    out = np.empty_like(weight)
    for head in range(num_heads):
        for i in range(head_dim // 2):
            start = head * head_dim
            out[start + 2 * i] = weight[start + i]
            out[start + 2 * i + 1] = weight[start + head_dim // 2 + i]
    return out


def hf_weights(tied):
    """A tiny Llama under Hugging Face's names, float32."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": normal(len(TOKENS), HIDDEN),
        "model.norm.weight": normal(HIDDEN),
    }
    if not tied:
        weights["lm_head.weight"] = normal(len(TOKENS), HIDDEN)
    for layer in range(LAYERS):
        weights |= {
            f"model.layers.{layer}.{name}.weight": value
            for name, value in {
                "input_layernorm": normal(HIDDEN),
                "self_attn.q_proj": normal(HEADS * HEAD_DIM, HIDDEN),
                "self_attn.k_proj": normal(KV_HEADS * HEAD_DIM, HIDDEN),
                "self_attn.v_proj": normal(KV_HEADS * HEAD_DIM, HIDDEN),
                "self_attn.o_proj": normal(HIDDEN, HEADS * HEAD_DIM),
                "post_attention_layernorm": normal(HIDDEN),
                "mlp.gate_proj": normal(MLP, HIDDEN),
                "mlp.up_proj": normal(MLP, HIDDEN),
                "mlp.down_proj": normal(HIDDEN, MLP),
            }.items()
        }
    return weights


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_tensors(weights):
    tensors = {}
    for name, value in weights.items():
        if "q_proj" in name:
            value = rope_interleaved(value, HEADS)
        if "k_proj" in name:
            value = rope_interleaved(value, KV_HEADS)
        for hf_part, part in GGUF_NAMES.items():
            name = name.replace(hf_part, part)
        tensors[name] = value
    return tensors


def write_gguf(
    path,
    tensors,
    architecture="llama",
    pre="smollm",
    chat_template=None,
    rope_scaling=None,
    quantization=gguf.GGMLQuantizationType.F32,
):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    if rope_scaling is not None:
        writer.add_rope_scaling_type(rope_scaling)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    normal, control, user = (
        gguf.TokenType.NORMAL,
        gguf.TokenType.CONTROL,
        gguf.TokenType.USER_DEFINED,
    )
    types = [control] * len(SPECIAL) + [normal] * (len(TOKENS) - len(SPECIAL) - 1) + [user]
    writer.add_token_types(types)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    for name, value in tensors.items():
        if value.ndim == 1:
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, quantize(value, quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_wheel(path, *members):
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("model/__init__.py", "")
        for member in members:
            wheel.write(member, f"model/{member.name}")
    return path


def read_bf16(path):
    """name -> array of a safetensors file, parsed by hand: header length, header, data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    tensors = {}
    for name, entry in header.items():
        assert entry["dtype"] == "BF16"
        begin, end = entry["data_offsets"]
        data = raw[8 + length + begin : 8 + length + end]
        tensors[name] = np.frombuffer(data, ml_dtypes.bfloat16).reshape(entry["shape"])
    return tensors


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", gguf_tensors(hf_weights(True)))


@pytest.fixture(scope="module")
def checkpoint(gguf_file, tmp_path_factory):
    return materialize(gguf_file, tmp_path_factory.mktemp("checkpoint") / "tiny")


def test_the_folder_is_a_hugging_face_checkpoint_and_nothing_is_left_beside_it(checkpoint):
    assert {path.name for path in checkpoint.iterdir()} == HF_FILES
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_config_says_what_the_metadata_say(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 512,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,  # exactly, though the file holds a float32
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": len(TOKENS),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert expected.items() <= config.items()
    assert "head_dim" not in config
    generation = json.loads((checkpoint / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2


@pytest.mark.parametrize("tied", [True, False])
def test_weights_come_back_in_hugging_face_order_rounded_to_nearest_even(tied, tmp_path):
    weights = hf_weights(tied)
    source = write_gguf(tmp_path / "tiny.gguf", gguf_tensors(weights))
    directory = materialize(source, tmp_path / "checkpoint")
    written = read_bf16(directory / "model.safetensors")
    assert written.keys() == weights.keys()
    for name, value in weights.items():
        expected = value.astype(ml_dtypes.bfloat16)
        assert (written[name].view(np.uint16) == expected.view(np.uint16)).all(), name
    config = json.loads((directory / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_quantized_tensors_are_dequantized(kind, tmp_path):
    quantization = gguf.GGMLQuantizationType[kind]
    weights = hf_weights(tied=True)
    source = write_gguf(tmp_path / "q.gguf", gguf_tensors(weights), quantization=quantization)
    written = read_bf16(materialize(source, tmp_path / "checkpoint") / "model.safetensors")
    for name, value in weights.items():
        # A step is the range of 32 values over 15 or 255; half of it, and bfloat16's rounding.
        step = np.ptp(value) / (15 if kind == "Q4_1" else 127) if value.ndim == 2 else 0.0
        error = np.abs(written[name].astype(np.float32) - value)
        assert (error <= 0.51 * step + np.abs(value) * 2**-7 + 1e-6).all(), name
    q = "model.layers.1.self_attn.q_proj.weight"
    assert len(np.unique(written[q][0, :32])) <= (16 if kind == "Q4_1" else 256)


def test_the_tokenizer_merges_bytes_splits_digits_and_knows_its_special_tokens(checkpoint):
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))

    def tokens(text):
        return tokenizer.encode(text).tokens

    assert tokens("abc ab") == ["abc", "Ġ", "ab"]
    assert tokens("12") == ["1", "2"]  # although there is a merge
    assert tokens("x  1") == ["x", "ĠĠ", "1"]
    assert tokens("x  y") == ["x", "Ġ", "Ġ", "y"]
    assert tokens("<|im_start|>abc\n<|im_end|>") == ["<|im_start|>", "abc", "Ċ", "<|im_end|>"]
    assert tokens("a<user>b") == ["a", "<user>", "b"]
    ids = tokenizer.encode("<|im_start|>ab 12<user>").ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>ab 12<user>"
    assert tokenizer.decode(ids) == "ab 12<user>"  # control tokens are special, the user's is not
    assert tokenizer.get_vocab_size() == len(TOKENS)


def test_tokenizer_config_and_special_tokens_map_agree(checkpoint):
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    special = json.loads((checkpoint / "special_tokens_map.json").read_text())
    named = {"bos_token": 1, "eos_token": 2, "unk_token": 0, "pad_token": 2}
    assert {name: config[name] for name in named} == {n: SPECIAL[i] for n, i in named.items()}
    assert {name: special[name]["content"] for name in named} == {
        name: config[name] for name in named
    }
    added = config["added_tokens_decoder"]
    flags = {int(id_): (token["content"], token["special"]) for id_, token in added.items()}
    assert flags == {
        0: ("<|endoftext|>", True),
        1: ("<|im_start|>", True),
        2: ("<|im_end|>", True),
        len(TOKENS) - 1: ("<user>", False),
    }


def test_the_chat_template_is_the_files_own_or_smollm2s(checkpoint, gguf_file, tmp_path):
    jinja2 = pytest.importorskip("jinja2")
    template = json.loads((checkpoint / "tokenizer_config.json").read_text())["chat_template"]
    text = jinja2.Template(template).render(
        messages=[{"role": "user", "content": "Hi"}], add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    tensors = gguf_tensors(hf_weights(tied=True))
    source = write_gguf(tmp_path / "own.gguf", tensors, chat_template="{{ messages }}")
    own = materialize(source, tmp_path / "own")
    assert (
        json.loads((own / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"
    )


def test_a_wheel_gives_what_its_gguf_gives(gguf_file, checkpoint, tmp_path):
    wheel = write_wheel(tmp_path / "model-1.0-py3-none-any.whl", gguf_file)
    directory = materialize(wheel, tmp_path / "deep" / "er" / "checkpoint")
    for name in HF_FILES:
        assert (directory / name).read_bytes() == (checkpoint / name).read_bytes(), name
    assert list(directory.parent.iterdir()) == [directory]


def test_a_second_call_reads_nothing(checkpoint):
    before = (checkpoint / "model.safetensors").stat().st_mtime_ns
    assert materialize(Path("gone.whl"), checkpoint) == checkpoint
    assert (checkpoint / "model.safetensors").stat().st_mtime_ns == before


def test_an_empty_directory_is_filled_and_a_strangers_is_left_alone(gguf_file, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert {path.name for path in materialize(gguf_file, empty).iterdir()} == HF_FILES
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(JaxquantError, match=r"mine exists and is not a checkpoint"):
        materialize(gguf_file, tmp_path / "mine")


def refused(source, tmp_path, match):
    directory = tmp_path / "out" / "checkpoint"
    with pytest.raises(JaxquantError, match=match):
        materialize(source, directory)
    assert not any(directory.parent.iterdir())  # neither the folder nor scraps of it


def test_a_source_that_is_not_there_or_not_a_model_is_refused(tmp_path):
    refused(tmp_path / "gone.gguf", tmp_path, r"gone\.gguf does not exist")
    other = tmp_path / "model.bin"
    other.touch()
    refused(other, tmp_path, r"model\.bin is neither a \.whl nor a \.gguf file")


def test_a_wheel_without_a_gguf_is_refused(tmp_path):
    wheel = write_wheel(tmp_path / "empty.whl")
    refused(wheel, tmp_path, r"empty\.whl: expected one \.gguf file inside, found none")


def test_a_wheel_with_two_is_refused(gguf_file, tmp_path):
    second = tmp_path / "second.gguf"
    second.touch()
    wheel = write_wheel(tmp_path / "two.whl", gguf_file, second)
    refused(wheel, tmp_path, r"found model/tiny\.gguf, model/second\.gguf")


def test_a_truncated_wheel_is_refused(gguf_file, tmp_path):
    wheel = write_wheel(tmp_path / "cut.whl", gguf_file)
    wheel.write_bytes(wheel.read_bytes()[:-100])
    refused(wheel, tmp_path, r"cut\.whl is not a whole wheel .*download it again")


@pytest.mark.parametrize("kept", [0.0, 0.0001, 0.01, 0.3, 0.999])
def test_a_truncated_gguf_is_refused(kept, gguf_file, tmp_path):
    whole = gguf_file.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: int(kept * len(whole))])
    refused(cut, tmp_path, r"cut\.gguf is truncated or not a GGUF file .*download it again")


def test_another_architecture_is_refused(tmp_path):
    source = write_gguf(tmp_path / "q.gguf", {}, architecture="qwen2")
    refused(source, tmp_path, r"q\.gguf: general\.architecture is 'qwen2'; only 'llama' is read")


def test_another_tokenizer_is_refused(tmp_path):
    source = write_gguf(tmp_path / "t.gguf", {}, pre="llama-bpe")
    refused(source, tmp_path, r"'gpt2' and 'llama-bpe'; only 'gpt2' and 'smollm'")


def test_scaled_rope_is_refused_rather_than_forgotten(tmp_path):
    source = write_gguf(tmp_path / "s.gguf", {}, rope_scaling=gguf.RopeScalingType.YARN)
    refused(source, tmp_path, r"llama\.rope\.scaling\.type is 'yarn'; only 'none' is read")


def test_a_missing_and_an_unexpected_tensor_are_named(tmp_path):
    tensors = gguf_tensors(hf_weights(tied=True))
    norm = tensors.pop("blk.1.ffn_norm.weight")
    source = write_gguf(tmp_path / "m.gguf", tensors)
    refused(source, tmp_path, r"m\.gguf lacks tensor 'blk\.1\.ffn_norm\.weight'")
    tensors["blk.1.ffn_norm.weight"] = tensors["blk.0.attn_q.bias"] = norm
    source = write_gguf(tmp_path / "u.gguf", tensors)
    refused(source, tmp_path, r"has the unexpected tensor 'blk\.0\.attn_q\.bias'")


def test_missing_metadata_are_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "bare.gguf", "llama")
    writer.add_tensor("output_norm.weight", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "bare.gguf", tmp_path, r"metadata lack 'llama\.attention\.head_count'")


def test_a_missing_package_says_how_to_install_it(gguf_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(gguf_file, tmp_path, r"needs the package gguf: pip install jaxquant\[demo\]")
