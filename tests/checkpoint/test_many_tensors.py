"""A checkpoint of 18,867 tensors, headers alone: what is done for each tensor stays cheap."""

import json
import math
import time

import builders
import jax.numpy as jnp
import pytest

import jaxquant as jq
from jaxquant.checkpoint.folder import CheckpointFolder
from jaxquant.checkpoint.plan import make_plan
from jaxquant.models.registry import places

L, E, K, WIDE, SHARDS = 48, 128, 2048, 768, 16
# The sizes of Qwen3-30B-A3B.
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": K,
    "intermediate_size": 6144,
    "num_hidden_layers": L,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": WIDE,
    "num_experts": E,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}
GATES = tuple(f"model.layers.{l}.mlp.gate" for l in range(L))


def shapes():
    yield "model.embed_tokens.weight", (151936, K)
    for l in range(L):
        layer = {
            "input_layernorm": (K,),
            "post_attention_layernorm": (K,),
            "self_attn.q_proj": (4096, K),
            "self_attn.k_proj": (512, K),
            "self_attn.v_proj": (512, K),
            "self_attn.o_proj": (K, 4096),
            "self_attn.q_norm": (128,),
            "self_attn.k_norm": (128,),
            "mlp.gate": (E, K),
        }
        for e in range(E):
            layer[f"mlp.experts.{e}.gate_proj"] = (WIDE, K)
            layer[f"mlp.experts.{e}.up_proj"] = (WIDE, K)
            layer[f"mlp.experts.{e}.down_proj"] = (K, WIDE)
        for name, shape in layer.items():
            yield f"model.layers.{l}.{name}.weight", shape
    yield "model.norm.weight", (K,)
    yield "lm_head.weight", (151936, K)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Headers before holes of 61 GB, which take no room."""
    path, tensors, weight_map = tmp_path_factory.mktemp("many"), list(shapes()), {}
    for s in range(SHARDS):
        header, offset, file = {}, 0, f"model-{s + 1:05}-of-{SHARDS:05}.safetensors"
        for name, shape in tensors[s::SHARDS]:
            end = offset + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
            offset, weight_map[name] = end, file
        text = json.dumps(header).encode()
        builders.save_raw(path / file, text, b"")
        with (path / file).open("r+b") as opened:
            opened.truncate(8 + len(text) + offset)
    builders.write_json(path / "model.safetensors.index.json", {"weight_map": weight_map})
    builders.write_json(path / "config.json", CONFIG)
    return path


@pytest.mark.parametrize("kept", [(), GATES], ids=["default", "modules named"])
def test_a_plan_of_18867_tensors_takes_seconds(folder, kept):
    start = time.perf_counter()
    with CheckpointFolder(folder) as checkpoint:
        plan = make_plan(checkpoint, jq.QuantConfig(modules_to_not_convert=kept))
        model = plan.family.abstract_model(jnp.bfloat16)
        found = places(model, {item.name: item.slot for item in plan.items})
    seconds = time.perf_counter() - start
    assert len(found) == 18867
    assert sum(item.config is not None for item in plan.items) == L * (4 + 3 * E)
    gate_up = model.layers[0].mlp.experts.gate_up_proj.weight
    assert gate_up.get_value().shape == (L, E, 2 * WIDE, K)
    place = found["model.layers.7.mlp.experts.5.up_proj.weight"]
    assert (place.param is gate_up, place.index, place.row) == (True, (7, 5), WIDE)
    assert seconds < 15  # 0.9 measured, on one core
