"""The benchmarks run on a CPU, and what they compare computes the same."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq

FOLDER = Path(__file__).parents[1] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def transform():
    return load("transform")


def test_transform_runs(transform, monkeypatch, capsys):
    command = "transform.py --shape tiny --form scanned --batch 2 --context 8 --prefill"
    monkeypatch.setattr(sys, "argv", command.split())
    transform.main()
    rows = capsys.readouterr().out.splitlines()[4:]
    programs = [row.split(" | ")[:2] for row in rows]
    names = ("BF16", "FP8, `jq.fp8`", "FP8, direct calls")
    assert programs == [[f"| {name}", "decode M=2"] for name in names]


@pytest.mark.parametrize("form", ["unrolled", "scanned"])
def test_transform_compares_the_same_products(transform, form):
    s = transform.SHAPES["tiny"]
    params = transform.make_params(s, form, jq.QuantConfig())
    caches = transform.make_caches(s, form, 1, 8)
    tokens = jnp.arange(4, dtype=jnp.int32)[None]
    plain = transform.make_forward(s)
    direct = transform.make_forward(s, transform.DirectLinear, transform.direct_at)
    args = (params, tokens, caches, 0)
    assert [leaf.matmuls for leaf in jq.fp8_report(plain, *args).leaves] == (
        [2] * 7 if form == "scanned" else [1] * 14
    )
    expected, actual = jax.jit(direct)(*args)[0], jax.jit(jq.fp8(plain))(*args)[0]
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("option", ["", "--single-steps"])
def test_a_row_of_the_model_is_measured(monkeypatch, capsys, option):
    command = f"model.py --shape tiny --batch 2 --context 8 --prefill 32 --measure fp8 {option}"
    monkeypatch.setattr(sys, "argv", command.split())
    load("model").main()
    found = dict(map(json.loads, capsys.readouterr().out.splitlines()))
    assert list(found) == ["on", "first", "decode 2", "prefill 32"]
    assert found.pop("on") == f"cpu, jax {jax.__version__}"
    assert all(value > 0 for value in found.values())


def test_steps_of_attention_run_over_both_caches(monkeypatch):
    attention = load("attention")
    monkeypatch.setattr(attention, "ROTATED_BYTES", 1 << 20)
    monkeypatch.setattr(attention, "REPEATS", 1)
    for dtype in ("bfloat16", "float8_e4m3fn"):
        run, make, L = attention.program(2, 128, 40, dtype, attention.BY_XLA)
        y, *_ = run(*make())
        assert L == -(-(1 << 20) // (2 * 40 * attention.slot_bytes(dtype)))
        assert np.isfinite(np.asarray(y, np.float32)).all()
    times = {"XLA": (None, 20.0), "BF16": (8.0, 9.0), "FP8": (5.0, 6.0)}
    cells = attention.row((1, 1536, 1024), times).split(" | ")
    assert cells == ["| 1", "1536", "1024", "20.0", "9.0", "6.0", "8.0", "0.52", "5.0", "0.43 |"]


def test_the_summary_of_the_products():
    results = {
        (1, 28672, 4096): {"BF16": 60.0, "FP8 tensor": 49.0, "with quant": 30.0},
        (16, 4096, 4096): {
            "BF16": 12.0,
            "FP8 tensor": 9.0,
            "cuBLASLt": 15.0,
            "jaxquant": 8.0,
            "with quant": 10.0,
        },
        (4096, 4096, 4096): {
            "BF16": 170.0,
            "FP8 tensor": 90.0,
            "cuBLASLt": 110.0,
            "jaxquant": 100.0,
            "with quant": 120.0,
        },
    }
    bandwidth = 28672 * 4096 / 30e-6 / 0.9
    assert load("matmul").summary(results, bandwidth).splitlines()[3:] == [
        "- over the faster of BF16 and cuBLASLt, M < 512: 1.732, 1.500 to 2.000 (2)",
        "- over the faster of BF16 and cuBLASLt, M < 512, quantization included: "
        "1.549, 1.200 to 2.000 (2)",
        "- weight read, of 4.35 TB/s, M <= 16, 60 MB or more: 0.900, 0.900 to 0.900 (1)",
        "- over cuBLASLt, M < 512: 1.875, 1.875 to 1.875 (1)",
        "- over cuBLASLt, M >= 512: 1.100, 1.100 to 1.100 (1)",
        "- over FP8 tensor, M >= 4096: 0.900, 0.900 to 0.900 (1)",
        "- over cuBLASLt, M = 16: 1.875, 1.875 to 1.875 (1)",
        "- over cuBLASLt, M = 4096: 1.100, 1.100 to 1.100 (1)",
    ]


def test_a_checkpoint_of_each_family_has_the_tensors_of_its_model(tmp_path):
    families = load("families")
    for case in ("internlm/internlm2", "gemma/gemma3", "moe/deepseek_v3"):
        model = families.load(families.checkpoint(case, tmp_path / case))
        assert model.module.cfg.hidden_size == 1024
