"""The choice of experts compiles for an H200; see `tests/hopper.py`."""

import json

import pytest
from hopper import h200, needs_plugin, run_apart

pytestmark = needs_plugin

# Tokens, experts, how many are chosen, with a bias, and options: few are sorted as well.
CASES = [
    (1, 128, 8, False, {}),
    (16, 256, 8, True, {"score": "sigmoid", "scale": 2.5}),
    (33, 60, 4, False, {"normalize": False}),
    (4096, 128, 8, False, {}),
    (4096, 8, 2, True, {"normalize": False}),
]


@pytest.fixture(scope="module")
def compiled():
    return run_apart(__file__)


@pytest.mark.parametrize("i", range(len(CASES)))
def test_a_kernel_chooses(compiled, i):
    T, _, k, *_ = CASES[i]
    kernel = "jaxquant_route" if T * k <= 128 else "jaxquant_choose_experts"
    assert kernel in compiled[i]
    assert " sort(" not in compiled[i]
    assert "topk" not in compiled[i].lower()


def test_vmap_runs_it_for_each(compiled):
    assert "jaxquant_route" in compiled[-1]


def compile_all() -> list[str | None]:
    import jax
    import jax.numpy as jnp

    from jaxquant.matmul import Routing, route

    sharding = h200()

    def compile_case(T, E, k, biased, options):
        def run(logits, bias):
            return route(Routing(E, k, **options), logits, bias)

        logits = jax.ShapeDtypeStruct((T, E), jnp.float32, sharding=sharding)
        bias = jax.ShapeDtypeStruct((E,), jnp.float32, sharding=sharding) if biased else None
        return jax.jit(run).lower(logits, bias).compile().as_text()

    def compile_batch():
        logits = jax.ShapeDtypeStruct((3, 16, 128), jnp.float32, sharding=sharding)
        run = jax.vmap(lambda logits: route(Routing(128, 8), logits))
        return jax.jit(run).lower(logits).compile().as_text()

    return [*(compile_case(*case) for case in CASES), compile_batch()]


if __name__ == "__main__":
    print(json.dumps(compile_all()))
