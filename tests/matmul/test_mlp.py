"""The gated MLP, its kernels run by Pallas's interpreter, against two products."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import on_hopper
from numpy_reference import BF16, make_weight, normal

from jaxquant import blocked
from jaxquant.config import QuantConfig
from jaxquant.errors import JaxquantError
from jaxquant.matmul import RMSNorm, SiluMul, gated_mlp, gemm_sm90, matmul, mlp, mosaic_gpu
from jaxquant.models.dense import GeluMul

L, F, K, N = 3, 256, 1024, 136


@pytest.fixture
def hopper(monkeypatch):
    with on_hopper(monkeypatch, mosaic_gpu, mlp):
        yield


@pytest.fixture
def apart(monkeypatch):
    """What was computed by two products."""
    calls = []
    two_products = mlp._two_products

    def counted(*args, **kwargs):
        calls.append(args)
        return two_products(*args, **kwargs)

    monkeypatch.setattr(mlp, "_two_products", counted)
    return calls


def array(*shape, seed=0):
    return jnp.asarray(make_weight(normal, shape, BF16, seed))


def operands(M, **config):
    gate_up, down = array(L, 2 * F, K), array(L, N, F, seed=1)
    around = {
        "prologue": RMSNorm(array(L, K, seed=2), 1e-5),
        "biases": (array(L, 2 * F, seed=3), array(L, N, seed=4)),
        "residual": array(1, M, N, seed=5),
    }
    weights = (blocked.quantize(w, QuantConfig(**config)) for w in (gate_up, down))
    return array(1, M, K, seed=6), *weights, around


def by_parts(x, gate_up, down, activation, *, layer, prologue, biases, residual):
    y = matmul(x, gate_up, layer=layer, prologue=prologue, bias=biases[0], implementation="xla")
    y = activation(y)
    return matmul(y, down, layer=layer, bias=biases[1], residual=residual, implementation="xla")


def assert_close(y, expected):
    y, expected = (np.asarray(a, np.float64) for a in (y, expected))
    assert y.shape == expected.shape
    # A value of h that is rounded the other way is off by 2^-4 in FP8.
    assert np.linalg.norm(y - expected) < 1e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("M", [1, 2, 3, 20, 136])
def test_one_kernel_less_and_the_same_result(hopper, apart, monkeypatch, M):
    monkeypatch.setattr(gemm_sm90, "gates", lambda *of: True)
    x, gate_up, down, around = operands(M)
    if M > 2:
        around["biases"] = None, around["biases"][1]
    y = gated_mlp(x, gate_up, down, layer=1, activation=SiluMul(), **around)
    assert not apart
    assert y.dtype == x.dtype
    assert_close(y, by_parts(x, gate_up, down, SiluMul(), layer=1, **around))


@pytest.mark.parametrize("M", [1, 3])
def test_groups_of_rows_are_gated_by_their_own(hopper, M):
    x, gate_up, down, around = operands(M)
    around["biases"] = None, None
    # Of the gate and of what it gates, 128 rows each.
    order = np.arange(2 * F).reshape(2, 2, -1).swapaxes(0, 1).reshape(-1)
    grouped = dataclasses.replace(
        gate_up,
        qvalue=gate_up.qvalue[:, order],
        scale=gate_up.scale[:, order[::128] // 128],
    )
    y = gated_mlp(x, grouped, down, layer=1, activation=SiluMul(), groups=2, **around)
    assert_close(y, by_parts(x, gate_up, down, SiluMul(), layer=1, **around))


@pytest.mark.parametrize("M", [1, 3])
def test_gradients_are_those_of_two_products(hopper, M):
    x, gate_up, down, around = operands(M)
    around["biases"] = None, None

    def loss(mlp):
        return lambda x: mlp(x).astype(jnp.float32).sum()

    def fused(x):
        return gated_mlp(x, gate_up, down, layer=1, activation=SiluMul(), **around)

    def by_two(x):
        return by_parts(x, gate_up, down, SiluMul(), layer=1, **around)

    assert_close(jax.grad(loss(fused))(x), jax.grad(loss(by_two))(x))


@pytest.mark.parametrize("M", [1, 3])
def test_under_vmap(hopper, M):
    x, gate_up, down, around = operands(M)
    around["biases"] = None, None

    def run(x):
        return gated_mlp(x, gate_up, down, layer=jnp.int32(2), activation=SiluMul(), **around)

    xs = jnp.stack([x, -x])
    np.testing.assert_array_equal(jax.vmap(run)(xs), jnp.stack([run(x) for x in xs]))


@pytest.mark.parametrize("case", ["activation", "down is BF16", "weight-only", "bias"])
def test_what_the_kernels_do_not_take_is_two_products(hopper, apart, case):
    config = {"activation_scheme": None} if case == "weight-only" else {}
    x, gate_up, down, around = operands(3 if case == "bias" else 1, **config)
    activation = GeluMul() if case == "activation" else SiluMul()
    if case == "down is BF16":
        down = down.dequantize(BF16)
    y = gated_mlp(x, gate_up, down, layer=1, activation=activation, **around)
    assert len(apart) == 1
    assert_close(y, by_parts(x, gate_up, down, activation, layer=1, **around))


def test_groups_that_are_not_equal():
    x, gate_up, down, around = operands(1)
    message = "groups is 3; allowed: what divides 256, rows of the gate"
    with pytest.raises(JaxquantError, match=message):
        gated_mlp(x, gate_up, down, layer=1, activation=SiluMul(), groups=3, **around)


@pytest.mark.parametrize("change", ["down", "residual", "biases", "layer"])
def test_shapes_that_do_not_fit(hopper, change):
    x, gate_up, down, around = operands(1)
    around["layer"] = 1
    if change == "down":
        down = jax.tree.map(lambda a: a[..., :1], down)
    else:
        around[change] = {"residual": x, "biases": (x, None), "layer": L}[change]
    what = {"down": "does not fit w", "residual": "residual is", "biases": "bias is"}
    with pytest.raises(JaxquantError, match=what.get(change, "layer is 3; allowed: 0 to 2")):
        gated_mlp(x, gate_up, down, activation=SiluMul(), **around)
