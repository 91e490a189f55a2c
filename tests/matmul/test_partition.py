"""Products of operands that lie on several devices, under plain `jax.jit`.

The devices are CPUs, and the product that stands in for the kernels is the reference's; what is
looked at is how operands are cut, and what is communicated.
"""

import json
import os
import re

import pytest
from hopper import run_apart

L, M, N, K = 2, 16, 512, 1024

# x, weight, prologue, and the collectives that are needed
CASES = {
    "rows": ("", "-x-", None, []),
    "columns": ("", "--x", None, ["all-reduce"]),
    "columns of both": ("-x", "--x", None, ["all-reduce"]),
    "rows and columns": ("", "-xy", None, ["all-reduce"]),
    "rows on two axes": ("", "-z-", None, []),
    "tokens": ("x-", "---", None, []),
    "tokens and rows": ("y-", "-x-", None, []),
    "tokens give way": ("x-", "-x-", None, ["all-gather"]),
    "rows after a norm": ("", "-x-", "rms_norm", []),
    "columns after a norm": ("", "--x", "rms_norm", ["all-reduce"]),
    "columns after a gate": ("", "--z", "silu_mul", ["all-reduce"]),
    "layers": ("", "x--", None, ["all-gather"]),
}


@pytest.fixture(scope="module")
def results():
    return run_apart(__file__)


@pytest.mark.parametrize("case", CASES)
def test_a_product_is_cut_as_its_weight(results, case):
    error, collectives, gathered = results[case]
    assert error <= 3e-6
    assert collectives == CASES[case][-1]
    if case != "layers":
        assert not gathered


def test_a_product_is_cut_in_a_scan_and_under_vmap_and_grad(results):
    for name in ("scan", "vmap", "grad"):
        error, collectives, gathered = results[name]
        assert error <= 3e-6
        assert set(collectives) <= {"all-reduce"}
        assert not gathered


@pytest.mark.parametrize(
    ("case", "needed"), [("-x-", []), ("--x", ["all-reduce"]), ("-xy", ["all-reduce"])]
)
def test_quantized_tokens_are_cut_as_the_weight(results, case, needed):
    error, collectives, gathered = results[f"quantized {case}"]
    assert error <= 3e-6
    assert collectives == needed
    assert not gathered


@pytest.mark.parametrize(("spec", "needed"), [("--x-", []), ("---x", ["all-reduce"])])
def test_experts_are_cut_as_their_weight(results, spec, needed):
    error, collectives, gathered = results[f"experts {spec}"]
    assert error <= 3e-6
    assert collectives == needed
    assert not gathered


# Rows and columns of both weights, groups of rows, tokens, and the collectives that are needed
MLPS = {
    "whole": ("---", "---", 1, "", []),
    "shares": ("-x-", "--x", 2, "", ["all-reduce"]),
    "shares of tokens": ("-x-", "--x", 2, "y-", ["all-reduce"]),
    "shares of several groups": ("-x-", "--x", 4, "", ["all-reduce"]),
    "shares on two axes": ("-z-", "--z", 4, "", ["all-reduce"]),
    "a gate elsewhere": ("-x-", "--x", 1, "", ["all-gather", "all-reduce"]),
    "columns": ("--x", "-x-", 1, "", ["all-reduce"]),
    "groups on one device": ("---", "---", 2, "", []),
}


@pytest.mark.parametrize("case", MLPS)
def test_devices_gate_their_share(results, case):
    error, collectives, gathered = results[f"mlp {case}"]
    assert error <= 3e-6
    assert collectives == MLPS[case][-1]
    assert not gathered


def run_all() -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from jaxquant.array import QuantizedArray
    from jaxquant.blocked import quantize_activations
    from jaxquant.matmul import (
        QuantizedTokens,
        RMSNorm,
        SiluMul,
        gated_mlp,
        grouped,
        grouped_matmul,
        matmul,
        mlp,
        mosaic_gpu,
        xla,
    )

    def stand_in(x, residual, stacks, layer, *, out_dtype, sms):
        qvalue, scale, prologue, bias = stacks
        assert qvalue.shape[1] % 128 == 0
        w = QuantizedArray(qvalue, scale, (128, 128), np.dtype(jnp.bfloat16))
        return xla.matmul(x, w, layer[0], out_dtype, prologue, bias, residual)

    def always(*of):
        return True

    def experts_stand_in(x, residual, stacks, index, *, out_dtype, sms):
        qvalue, scale, prologue, _ = stacks
        assert qvalue.shape[1] % 128 == 0
        layer, sizes, rows, _ = index
        w = QuantizedArray(qvalue, scale, (128, 128), np.dtype(jnp.bfloat16))
        w = jax.tree.map(lambda leaf: leaf.reshape(-1, len(sizes), *leaf.shape[1:]), w)
        x = (x if prologue is None else prologue(x))[rows]
        return grouped.tiled(x, w, sizes, layer[0], out_dtype, "xla")

    grouped._run, grouped._FEW_ROWS = experts_stand_in, 0
    mosaic_gpu.multiprocessors = lambda x, what: 2
    mosaic_gpu.run_product = mlp.run_product = stand_in

    def gated_stand_in(x, stacks, layer, sms):
        assert stacks[0].shape[1] % 256 == 0
        return SiluMul()(stand_in(x, None, stacks, layer, out_dtype=x.dtype, sms=sms))

    mlp.multiprocessors, mlp._gates, mlp._gated = mosaic_gpu.multiprocessors, always, gated_stand_in
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)

    def put(a, spec):
        axes = {"-": None, "x": "x", "y": "y", "z": ("x", "y")}
        sharding = NamedSharding(mesh, PartitionSpec(*(axes[c] for c in spec)))
        return jax.device_put(a, sharding)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    qvalue = (normal(L, N, K) * 60).astype(jnp.float8_e4m3fn)
    scale = np.exp(normal(L, N // 128, K // 128))
    bias, residual, norm = normal(L, N), normal(M, N), normal(L, K)

    def weight(spec):
        pieces = put(qvalue, spec), put(scale, spec)
        return QuantizedArray(*pieces, (128, 128), np.dtype(jnp.bfloat16))

    def measure(run, *args):
        compiled = jax.jit(run).lower(*args).compile()
        text = compiled.as_text() or ""
        y = np.asarray(compiled(*args), np.float64)
        expected = np.asarray(run(*jax.tree.map(np.asarray, args)), np.float64)
        error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
        names = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
        collectives = [name for name in names if re.search(rf" {name}(-start)?\(", text)]
        gathered = re.search(r"f8e4m3fn\S* all-gather|u8\S* all-gather", text)
        return float(error), collectives, gathered is not None

    def product(x, w, layer, prologue, bias, residual):
        return matmul(x, w, layer=layer, prologue=prologue, bias=bias, residual=residual)

    results = {}
    for name, (x_spec, w_spec, prologue_name, _) in CASES.items():
        x = put(normal(M, 2 * K if prologue_name == "silu_mul" else K), x_spec)
        prologue = {"rms_norm": RMSNorm(norm, 1e-5), "silu_mul": SiluMul(), None: None}
        args = x, weight(w_spec), jnp.int32(1), prologue[prologue_name], bias, residual
        results[name] = measure(product, *args)

    def scan(x, w):
        return lax.scan(lambda x, l: (x + matmul(x, w, layer=l)[:, :1], None), x, jnp.arange(L))[0]

    def vmap(x, w):
        return jax.vmap(lambda x, w: matmul(x, w, layer=1), (0, None))(x, w)

    def grad(x, w):
        return jax.grad(lambda x: (matmul(x, w, layer=1) ** 2).sum())(x)

    x = put(normal(M, K), "")
    for run in (scan, vmap, grad):
        results[run.__name__] = measure(run, x, weight("-xy"))

    for name, (up_spec, down_spec, groups, x_spec, _) in MLPS.items():
        F = 2 * 512
        up = QuantizedArray(
            put((normal(L, 2 * F, K) * 60).astype(jnp.float8_e4m3fn), up_spec),
            put(np.exp(normal(L, 2 * F // 128, K // 128)) * 1e-4, up_spec),
            (128, 128),
            np.dtype(jnp.bfloat16),
        )
        down = QuantizedArray(
            put((normal(L, N, F) * 60).astype(jnp.float8_e4m3fn), down_spec),
            put(np.exp(normal(L, N // 128, F // 128)), down_spec),
            (128, 128),
            np.dtype(jnp.bfloat16),
        )

        def whole_mlp(x, up, down, layer, norm, biases, residual, groups=groups):
            return gated_mlp(
                x,
                up,
                down,
                layer=layer,
                prologue=norm,
                activation=SiluMul(),
                biases=biases,
                residual=residual,
                groups=groups,
            )

        around = RMSNorm(norm, 1e-5), (normal(L, 2 * F), bias), residual
        x = put(normal(M, K), x_spec)
        results[f"mlp {name}"] = measure(whole_mlp, x, up, down, jnp.int32(1), *around)

    xq, sx = quantize_activations(normal(M, K))
    tokens = QuantizedTokens(put(xq, ""), put(sx.T, ""), (M,), np.dtype(jnp.float32))
    for spec in ("-x-", "--x", "-xy"):
        args = tokens, weight(spec), jnp.int32(1), None, bias, residual
        results[f"quantized {spec}"] = measure(product, *args)
    E, sizes, rows = 4, jnp.asarray([5, 0, 9, 2], jnp.int32), jnp.asarray(rng.permutation(M))

    def experts(x, qvalue, scale):
        w = QuantizedArray(qvalue, scale, (128, 128), np.dtype(jnp.bfloat16))
        of = grouped_matmul(x, w, sizes, rows=rows, layer=jnp.int32(1), prologue=SiluMul())
        return of.astype(jnp.float32)

    for spec in ("--x-", "---x"):
        qvalue = put((normal(L, E, N, K) * 60).astype(jnp.float8_e4m3fn), spec)
        scale = put(np.exp(normal(L, E, N // 128, K // 128)), spec)
        x = put(normal(M, 2 * K), "").astype(jnp.bfloat16)
        results[f"experts {spec}"] = measure(experts, x, qvalue, scale)
    return results


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    print(json.dumps(run_all()))
