"""Weights are quantized on H200s, each its part of a weight; see `tests/hopper.py`."""

import json

import pytest
from hopper import h200s, needs_plugin, run_apart

pytestmark = needs_plugin

# Shape, dtype, sharding, config; what each device quantizes; is a scale gathered, or the weight?
WEIGHTS = {
    "one": ((4096, 4096), "bfloat16", (), {}, (1, 4096, 4096), False),
    "rows": ((1024, 4096), "bfloat16", ("x",), {}, (1, 512, 4096), False),
    "columns": ((200, 4096), "float32", (None, "x"), {"fmt": "e5m2"}, (1, 200, 2048), False),
    "stack": ((4, 200, 576), "float16", ("x",), {"scale_fmt": "ue8m0"}, (2, 200, 576), False),
    "no whole blocks": ((192, 576), "bfloat16", ("x",), {}, (1, 192, 576), True),
}


@pytest.fixture(scope="module")
def compiled():
    return run_apart(__file__)


@pytest.mark.parametrize("case", WEIGHTS)
def test_each_device_quantizes_what_it_has(compiled, case):
    *_, config, shape, gathers = WEIGHTS[case]
    fmt = "f8e5m2" if config.get("fmt") else "f8e4m3fn"
    calls = [line for line in compiled[case].splitlines() if "custom-call(" in line]
    assert any(f"({fmt}[{','.join(map(str, shape))}]" in line for line in calls)
    assert "jaxquant_quantize_weight" in compiled[case]
    assert ("all-gather" in compiled[case]) == gathers


def test_a_program_for_a_cpu_has_no_kernel(compiled):
    assert "jaxquant_quantize_weight" not in compiled["cpu"]


def compile_all() -> dict[str, str | None]:
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    import jaxquant as jq

    mesh = h200s(2)

    def compile_one(shape, dtype, spec, config, *_):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return compiled(jax.ShapeDtypeStruct(shape, dtype, sharding=sharding), config)

    def compiled(w, config):
        run = jax.jit(lambda w: jq.quantize(w, jq.QuantConfig(**config)))
        return run.lower(w).compile().as_text()

    cpu = {"cpu": compiled(jax.ShapeDtypeStruct((256, 256), "bfloat16"), {})}
    return cpu | {case: compile_one(*weight) for case, weight in WEIGHTS.items()}


if __name__ == "__main__":
    print(json.dumps(compile_all()))
