"""The benchmarks run on a CPU, and what they compare computes the same."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def transform():
    spec = importlib.util.spec_from_file_location("transform", FOLDER / "transform.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
