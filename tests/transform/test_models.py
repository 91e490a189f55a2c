"""Models of other libraries, which know nothing of quantization."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from fp8_checks import BLOCKS, assert_close, assert_runs_as_fp8, dequantized, is_quantized, normal

import jaxquant as jq
from jaxquant.transform import fp8, fp8_report

KEY = jax.random.key(0)
X = normal(2, 8, 64)


def quantize(params, *rules):
    return jq.quantize_tree(params, BLOCKS, rules=rules)[0]


# Flax linen --------------------------------------------------------------------------------------


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.Dense(128)(nn.LayerNorm()(x))
        return x + nn.remat(nn.Dense)(64)(nn.gelu(h)), None


class LinenScanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return layers()(x, None)[0]


def test_linen():
    params = LinenBlock().init(KEY, X)
    assert_runs_as_fp8(LinenBlock().apply, quantize(params, "kernel"), X, matmuls=2)


def test_linen_scan_over_layers():
    params = LinenScanned().init(KEY, X)
    assert_runs_as_fp8(LinenScanned().apply, quantize(params, "kernel"), X, matmuls=6)


# Flax NNX ----------------------------------------------------------------------------------------


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(64, rngs=rngs)
        self.query, self.key, self.value, self.out = (
            nnx.Linear(64, 64, rngs=rngs) for _ in range(4)
        )
        self.up, self.down = nnx.Linear(64, 128, rngs=rngs), nnx.Linear(128, 64, rngs=rngs)

    def __call__(self, x):
        h = self.norm(x)
        q, k, v = (f(h).reshape(*x.shape[:2], 4, 16) for f in (self.query, self.key, self.value))
        x = x + self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))
        return x + self.down(nnx.silu(self.up(self.norm(x))))


def test_nnx_state():
    graph, state = nnx.split(NnxBlock(nnx.Rngs(0)))
    state = quantize(state, "kernel")
    assert_runs_as_fp8(lambda state, x: nnx.merge(graph, state)(x), state, X, matmuls=6)


def test_nnx_module_as_an_argument_and_as_the_function():
    model = quantize(NnxBlock(nnx.Rngs(0)), "kernel")
    y = fp8(lambda model, x: model(x))(model, X)
    assert_close(y, fp8(model)(X))
    assert_runs_as_fp8(lambda model, x: nnx.jit(lambda m, x: m(x))(model, x), model, X, matmuls=6)


def test_nnx_layers_scanned():
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(key):
        return NnxBlock(nnx.Rngs(key))

    def forward(state, x):
        layers = nnx.merge(graph, state)
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            x, layers
        )

    graph, state = nnx.split(create(jax.random.split(KEY, 3)))
    assert_runs_as_fp8(forward, quantize(state, "kernel"), X, matmuls=18)


def test_decoding_with_the_parameters_in_the_carry():
    graph, state = nnx.split(NnxBlock(nnx.Rngs(0)))

    def decode(state, x):
        def step(_, carry):
            state, x = carry
            model = nnx.merge(graph, state)
            return nnx.state(model), model(x) / 8

        return jax.lax.fori_loop(0, 3, step, (state, x))[1]

    assert_runs_as_fp8(decode, quantize(state, "kernel"), X, matmuls=18)


# Equinox -----------------------------------------------------------------------------------------


class EquinoxBlock(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    norm: eqx.nn.LayerNorm

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(4, 64, key=first)
        self.mlp = eqx.nn.MLP(64, 64, 128, 1, activation=jax.nn.gelu, key=second)
        self.norm = eqx.nn.LayerNorm(64)

    def __call__(self, x):
        h = jax.vmap(self.norm)(x)
        x = x + self.attention(h, h, h)
        return x + jax.vmap(self.mlp)(jax.vmap(self.norm)(x))


def quantized_equinox():
    arrays, rest = eqx.partition(EquinoxBlock(KEY), eqx.is_array)
    arrays = quantize(arrays, r"(proj|layers/\d+)/weight")
    return eqx.combine(arrays, rest, is_leaf=is_quantized)


def test_equinox():
    model = quantized_equinox()
    expected = jax.vmap(dequantized(model))(X)
    assert_close(jax.vmap(fp8(model, weight_only=True))(X), expected)
    assert_close(fp8(eqx.filter_vmap(model), weight_only=True)(X), expected)
    report = fp8_report(lambda model, x: jax.vmap(model)(x), model, X)
    assert sum(leaf.matmuls for leaf in report.leaves) == 6
    assert not report.dequantized


def test_equinox_filter_jit_and_filter_grad():
    model = quantized_equinox()

    @eqx.filter_jit
    def loss(x, model, run):
        return jnp.sum(run(model, x) ** 2)

    def forward(model, x):
        return jax.vmap(model)(x)

    expected = eqx.filter_grad(loss)(X, dequantized(model), forward)
    actual = eqx.filter_grad(loss)(X, model, fp8(forward, weight_only=True))
    assert_close(actual, expected, 1e-4)


# Haiku -------------------------------------------------------------------------------------------


def haiku_block(x):
    def norm(x):
        return hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)

    attention = hk.MultiHeadAttention(
        4, 16, model_size=64, w_init=hk.initializers.VarianceScaling()
    )
    h = norm(x)
    x = x + attention(h, h, h)
    return x + hk.nets.MLP([128, 64], activation=jax.nn.gelu)(norm(x))


def test_haiku():
    model = hk.without_apply_rng(hk.transform(haiku_block))
    params = quantize(model.init(KEY, X), jq.Rule("/w$", transposed=True))
    assert_runs_as_fp8(model.apply, params, X, matmuls=6)


def test_haiku_layer_stack():
    def fn(x):
        return hk.experimental.layer_stack(3)(haiku_block)(x)

    model = hk.without_apply_rng(hk.transform(fn))
    params = quantize(model.init(KEY, X), jq.Rule("/w$", transposed=True))
    assert_runs_as_fp8(model.apply, params, X, matmuls=18)


def test_dynamic_activations_stay_near():
    graph, state = nnx.split(NnxBlock(nnx.Rngs(0)))
    quantized = quantize(state, "kernel")

    def forward(state, x):
        return nnx.merge(graph, state)(x)

    y, expected = jax.jit(fp8(forward))(quantized, X), forward(state, X)
    assert float(jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected)) < 0.05
    assert np.isfinite(y).all()
