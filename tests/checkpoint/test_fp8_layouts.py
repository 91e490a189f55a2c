"""FP8 checkpoints as others write them, with experts: every byte arrives where it belongs.

The weights are the golden ones, quantized in numpy; the layouts are those of DeepSeek V3 and V3.1,
Qwen3, transformers 5 and llm-compressor.
"""

from pathlib import Path

import builders
import jax.numpy as jnp
import numpy as np
import pytest
from moe_checkpoints import BLOCK, GOLDEN, stacked, to_fp8, variant, weights

import jaxquant as jq
from jaxquant.array import QuantizedArray
from jaxquant.models.hf_config import HFConfig
from jaxquant.models.registry import Family, places

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
       "weight_block_size": [BLOCK, BLOCK]}  # fmt: skip


def compressed_tensors(strategy, **more):
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, **more}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": {"num_bits": 8, "type": "float", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


BLOCKS = compressed_tensors("block", block_structure=[BLOCK, BLOCK])
LAYOUTS = {
    "deepseek_v3": ("deepseek_v3", {}, FP8),
    "deepseek_v3.1": ("deepseek_v3", {}, {**FP8, "scale_fmt": "ue8m0"}),
    "qwen3": ("qwen3_moe", {"dtype": builders.BF16}, FP8),
    "e8m0": ("qwen3_moe", {"suffix": ".scale", "dtype": builders.E8M0},
             {**FP8, "scale_fmt": "ue8m0"}),
    "compressed-tensors": ("qwen3_moe", {"suffix": ".weight_scale"}, BLOCKS),
}  # fmt: skip


def check(folder: Path, tensors: dict, suffix: str) -> None:
    """All projections in the model are the file's bytes and scales."""
    model = jq.from_pretrained(folder, dtype=jnp.float32)
    slots, found = Family(HFConfig(model.hf_config)).slots(), 0
    for name, place in places(model.module, slots).items():
        value = place.param.get_value()
        scale = tensors.get(name.removesuffix(".weight") + suffix)
        assert isinstance(value, QuantizedArray) == (scale is not None)
        if scale is None:
            continue
        N = slots[name].shape[0]
        q = np.asarray(value.qvalue[place.index])[place.row : place.row + N]
        row = place.row // BLOCK
        s = np.asarray(value.scale[place.index])[row : row - (-N // BLOCK)]
        assert np.array_equal(q.view(np.uint8), tensors[name].view(np.uint8)), name
        assert np.array_equal(s, scale.astype(np.float32)), name
        found += 1
    assert found == sum(name.endswith(suffix) for name in tensors) > 40


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_projection_arrives(tmp_path, layout):
    case, options, quantization = LAYOUTS[layout]
    made = {}

    def change(tensors):
        made.update(to_fp8(tensors, powers_of_two="scale_fmt" in quantization, **options))
        return made

    variant(case, tmp_path, change, quantization_config=quantization)
    check(tmp_path, made, options.get("suffix", ".weight_scale_inv"))


def test_scales_in_another_shard(tmp_path):
    made = to_fp8(weights(GOLDEN / "qwen3_moe"))
    variant("qwen3_moe", tmp_path, lambda tensors: made, quantization_config=FP8)
    (tmp_path / "model.safetensors").unlink()
    shards = {"a.safetensors": {}, "b.safetensors": {}}
    for name, x in made.items():
        shards["b.safetensors" if "scale" in name else "a.safetensors"][name] = x
    for file, content in shards.items():
        builders.save(tmp_path / file, content)
    weight_map = {name: file for file, content in shards.items() for name in content}
    builders.write_json(tmp_path / "model.safetensors.index.json", {"weight_map": weight_map})
    check(tmp_path, made, ".weight_scale_inv")


def stacked_fp8(tensors):
    """As transformers 5 has them in memory: experts stacked, and their scales."""
    return {
        name.replace(".weight_scale_inv", "_scale_inv") if ".experts." in name else name: x
        for name, x in stacked_with_scales(to_fp8(tensors)).items()
    }


def stacked_with_scales(tensors):
    scales = {n: x for n, x in tensors.items() if n.endswith("_scale_inv")}
    of_experts = {n.removesuffix("_scale_inv"): x for n, x in scales.items() if ".experts." in n}
    together = stacked({n: x for n, x in tensors.items() if n not in scales})
    others = {n: x for n, x in scales.items() if ".experts." not in n}
    experts = {f"{n}_scale_inv": x for n, x in stacked(of_experts).items()}
    return {**together, **others, **experts}


def test_stacked_experts_with_stacked_scales(tmp_path):
    def widen(tensors):  # an expert's 36 rows are no whole blocks; 64 are
        for name, w in tensors.items():
            if ".experts." in name:
                grow = ((0, 28), (0, 0)) if "down" not in name else ((0, 0), (0, 28))
                tensors[name] = np.pad(w, grow)
        return tensors

    made = to_fp8(widen(weights(GOLDEN / "qwen3_moe")))
    variant(
        "qwen3_moe",
        tmp_path,
        lambda tensors: stacked_fp8(widen(tensors)),
        quantization_config=FP8,
        moe_intermediate_size=64,
    )
    check(tmp_path, made, ".weight_scale_inv")


def test_stacked_blocks_that_reach_over_two_projections_are_refused(tmp_path):
    def whole(tensors):  # 72 rows have 3 rows of blocks, the second of both projections
        tensors = stacked_fp8(tensors)
        for name, x in tensors.items():
            if name.endswith("gate_up_proj_scale_inv"):
                tensors[name] = np.ascontiguousarray(x[:, :3])
        return tensors

    variant("qwen3_moe", tmp_path, whole, quantization_config=FP8)
    with pytest.raises(
        jq.CheckpointError, match="blocks of 32 rows, which do not divide its parts"
    ):
        jq.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ({"quant_method": "fp8", "activation_scheme": "static"}, "one scale per tensor"),
        ({**FP8, "weight_block_size": None}, "one scale per tensor"),
        (compressed_tensors("channel"), "one scale per channel"),
        (compressed_tensors("tensor"), "one scale per tensor"),
        ({"quant_method": "mxfp4"}, "quantized with 'mxfp4'"),
        ({"quant_method": "awq", "bits": 4}, "quantized with 'awq'"),
        ({"quant_method": "gptq", "bits": 4}, "quantized with 'gptq'"),
        ({"quant_method": "bitsandbytes"}, "quantized with 'bitsandbytes'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quantized with 'modelopt'"),
        (
            {**BLOCKS, "format": "pack-quantized", "config_groups": {"group_0": {"weights": {
                "num_bits": 4, "type": "int", "strategy": "group"}}}},
            "config_groups.weights",
        ),
    ],
)  # fmt: skip
def test_what_is_not_blocked_fp8_is_refused_by_name(tmp_path, quantization, named):
    variant("qwen3_moe", tmp_path, lambda tensors: tensors, quantization_config=quantization)
    with pytest.raises(jq.CheckpointError, match="BF16 checkpoint") as info:
        jq.from_pretrained(tmp_path)
    assert named in str(info.value)
    assert "config.json" in str(info.value)
