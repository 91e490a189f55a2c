"""Products on a Hopper GPU at the shapes of models, where all multiprocessors are at work.

What is expected is computed on the GPU too, in float64, of what XLA quantizes.
"""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import jaxquant as jq
from jaxquant import blocked
from jaxquant.matmul import RMSNorm, Routing, SiluMul, gated_mlp, grouped_matmul, matmul, route
from jaxquant.matmul.act_quant_sm90 import quantize

pytestmark = pytest.mark.gpu
BF16 = jnp.bfloat16
# A model of 8B, DeepSeek-V3's narrow and short ones, SmolLM2's, and what no tile divides.
SHAPES = [
    (6144, 4096),
    (4096, 4096),
    (28672, 4096),
    (4096, 14336),
    (2112, 7168),
    (32768, 512),
    (960, 576),
    (1000, 2080),
]


@pytest.fixture(autouse=True)
def hopper():
    """There is one."""


def random(*shape: int, seed: int = 0, tails: bool = False) -> jax.Array:
    x = jax.random.normal(jax.random.key(seed), shape, jnp.float32)
    return (jnp.exp(3 * x) * jnp.sign(x) if tails else x).astype(BF16)


@functools.cache
def weight(*shape: int, tails: bool = False, **config: Any) -> jq.QuantizedArray:
    w = random(*shape, seed=1, tails=tails)
    return blocked.quantize(w, jq.QuantConfig(**config), implementation="xla")


def exact(qvalue: Any, scale: Any, block: tuple[int, int]) -> jax.Array:
    """`qvalue * scale`, under x64."""
    for axis, size in zip((-2, -1), block, strict=True):
        scale = jnp.repeat(scale, size, axis, total_repeat_length=size * scale.shape[axis])
    scale = scale[..., : qvalue.shape[-2], : qvalue.shape[-1]]
    return qvalue.astype(jnp.float64) * scale.astype(jnp.float64)


def product(x: jax.Array, w: jq.QuantizedArray, layer: int | None = None) -> jax.Array:
    """In float64, under x64."""
    qvalue, scale = (a if layer is None else a[layer] for a in (w.qvalue, w.scale))
    w_exact = exact(qvalue, scale, (128, 128))
    if w.activation_scheme is None:
        return x.astype(jnp.float64) @ w_exact.T
    return exact(*blocked.quantize_activations(x), (1, 128)) @ w_exact.T


def error(y: jax.Array, expected: jax.Array) -> float:
    return float(jnp.linalg.norm(y.astype(jnp.float64) - expected) / jnp.linalg.norm(expected))


def same_bytes(a: Any, b: Any) -> bool:
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in leaves)


@pytest.mark.parametrize("M", [1, 2, 3, 8, 16, 33, 64, 128, 129, 512, 1000, 4096])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_a_product_is_the_definitions_and_the_same_again(M, N, K):
    x, w = random(M, K), weight(2, N, K)
    run = jax.jit(functools.partial(matmul, implementation="mosaic_gpu"))
    y = run(x, w, layer=1)
    assert same_bytes(y, run(x, w, layer=1))
    with jax.enable_x64(True):
        assert error(y, product(x, w, 1)) <= 3e-3


@pytest.mark.parametrize("M", [1, 2, 16, 64, 300])
def test_values_far_apart(M):
    x, w = random(M, 4096, tails=True), weight(4096, 4096, tails=True)
    y = matmul(x, w, implementation="mosaic_gpu")
    with jax.enable_x64(True):
        assert error(y, product(x, w)) <= 3e-3


@pytest.mark.parametrize("M", [1, 2, 4, 16, 64, 100, 600])
@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (1000, 2080)])
def test_what_stands_around_a_product(M, N, K):
    x, w, norm = random(M, K), weight(2, N, K), RMSNorm(random(2, K, seed=2), 1e-5)
    bias, residual = random(2, N, seed=3), random(M, N, seed=4)
    around: Any = {"layer": 1, "prologue": norm, "bias": bias, "residual": residual}
    y = matmul(x, w, **around, implementation="mosaic_gpu")
    with jax.enable_x64(True):
        expected = product(norm(x, 1), w, 1) + bias[1].astype(float) + residual.astype(float)
        # Besides: a normalized value may round the other way before it is quantized.
        assert error(y, expected) <= 6e-3


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
@pytest.mark.parametrize("M", [1, 3, 16, 64, 130, 1000])
@pytest.mark.parametrize(("N", "K"), [(4096, 14336), (1000, 2080)])
def test_weight_only(M, N, K, fmt):
    x, w = random(M, K), weight(N, K, fmt=fmt, activation_scheme=None)
    y = matmul(x, w, implementation="mosaic_gpu")
    with jax.enable_x64(True):
        assert error(y, product(x, w)) <= 3e-3


@pytest.mark.parametrize("M", [1, 2, 5, 16, 64, 200, 2048])
@pytest.mark.parametrize(("F", "K"), [(14336, 4096), (1536, 576), (17408, 5120)])
def test_a_gated_mlp_has_the_bytes_of_two_products(M, F, K):
    x, gate_up, down = random(M, K), weight(2, 2 * F, K), weight(2, K, F)
    around: dict[str, Any] = {"layer": 1, "prologue": RMSNorm(random(2, K, seed=2), 1e-5)}
    residual = random(M, K, seed=3)

    @jax.jit
    def together(x, gate_up, down, residual):
        return gated_mlp(x, gate_up, down, **around, activation=SiluMul(), residual=residual)

    h = jax.jit(matmul)(x, gate_up, **around)
    expected = jax.jit(matmul)(h, down, layer=1, prologue=SiluMul(), residual=residual)
    y = together(x, gate_up, down, residual)
    assert same_bytes(y, expected)


@pytest.mark.parametrize("T", [1, 2, 16, 64, 512, 4096])
@pytest.mark.parametrize(("E", "N", "K"), [(128, 1536, 4096), (64, 2816, 2048), (8, 256, 512)])
def test_experts(caplog, T, E, N, K):
    caplog.set_level(logging.DEBUG, "jaxquant.matmul")
    x, w = random(T, K), weight(E, N, K)
    logits = random(T, E, seed=5).astype(jnp.float32)
    _, rows, places, sizes = route(Routing(E, 8), logits)
    run = jax.jit(grouped_matmul)
    y = run(x, w, sizes, rows=rows, places=places)
    assert same_bytes(y, run(x, w, sizes, rows=rows, places=places))
    assert "a loop over tiles" not in caplog.text
    ends = np.cumsum(np.asarray(sizes))
    assert ends[-1] == 8 * T
    with jax.enable_x64(True):
        xs = exact(*blocked.quantize_activations(x), (1, 128))
        for e, (start, end) in enumerate(zip(ends - np.asarray(sizes), ends, strict=True)):
            if start < end:
                w_exact = exact(w.qvalue[e], w.scale[e], (128, 128))
                assert error(y[start:end], xs[rows[start:end]] @ w_exact.T) <= 4e-3


@pytest.mark.parametrize("options", [{}, {"score": "sigmoid", "normalize": False, "scale": 2.5}])
@pytest.mark.parametrize("T", [1, 5, 16, 700, 4096])
@pytest.mark.parametrize(("E", "k"), [(128, 8), (60, 4), (8, 2)])
def test_routes_are_those_of_a_cpu(caplog, T, E, k, options):
    caplog.set_level(logging.DEBUG, "jaxquant.matmul")
    routing, logits = Routing(E, k, **options), random(T, E, seed=6).astype(jnp.float32)
    got = jax.jit(functools.partial(route, routing))(logits)
    assert "through XLA" not in caplog.text
    with jax.default_device(jax.devices("cpu")[0]):
        expected = route(routing, jax.device_put(logits, jax.devices("cpu")[0]))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    assert same_bytes(got[1:], expected[1:])


@pytest.mark.parametrize("M", [1, 5, 13, 64, 129, 4096])
@pytest.mark.parametrize("K", [128, 512, 1152, 2080, 4096, 14336])
def test_tokens_are_quantized_to_the_byte(M, K):
    x = random(M, K, tails=True)
    qvalue, scale = quantize(None, x, jnp.zeros(1, jnp.int32), K, -(-M // 8) * 8)
    expected = blocked.quantize_activations(x)
    assert same_bytes((qvalue[:M], scale.T[:M]), expected)


@pytest.mark.parametrize("shape", [(28672, 4096), (3, 1000, 2080)])
@pytest.mark.parametrize("config", [{}, {"fmt": "e5m2", "scale_fmt": "ue8m0"}])
def test_weights_are_quantized_to_the_byte(shape, config):
    w, config = random(*shape, tails=True), jq.QuantConfig(**config)
    by_kernel = jq.quantize(w, config, implementation="mosaic_gpu")
    assert same_bytes(by_kernel, jq.quantize(w, config, implementation="xla"))


@pytest.mark.parametrize("M", [1, 16, 600])
def test_kept_kernels_give_the_same_bytes(tmp_path, M):
    x, gate_up, down = random(M, 1024), weight(4096, 1024), weight(1024, 2048)

    def run():
        jax.clear_caches()  # of what is traced, in which kernels are kept or not
        return jax.jit(lambda x: gated_mlp(x, gate_up, down, activation=SiluMul()))(x)

    expected = run()
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    compilation_cache.reset_cache()
    try:
        assert same_bytes(run(), expected)
        assert same_bytes(run(), expected)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()
    assert list((tmp_path / "jaxquant-kernels").iterdir())
