"""QuantizedArray under everything JAX does to a pytree of arrays."""

# pyright: reportArgumentType=false
# (`weight_block_size` takes an int too, and becomes a pair)

import copy
import dataclasses
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from numpy_reference import BF16, differing, make_weight, normal

from jaxquant import blocked
from jaxquant.array import QuantizedArray, nbytes
from jaxquant.config import QuantConfig
from jaxquant.matmul import matmul


def quantized(*shape: int, block: int = 128, transposed: bool = False) -> QuantizedArray:
    w = jnp.asarray(make_weight(normal, shape, BF16, seed=0))
    qa = blocked.quantize(w, QuantConfig(weight_block_size=block, activation_scheme=None))
    return dataclasses.replace(qa, transposed=transposed)


def assert_same(a: Any, b: Any) -> None:
    assert isinstance(a, QuantizedArray)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert (differing(a.qvalue, b.qvalue), differing(a.scale, b.scale)) == (0, 0)


QA = quantized(130, 300)
STACK = quantized(4, 130, 300)

# As an array --------------------------------------------------------------------------------------


def test_invariants():
    assert QA.qvalue.shape == QA.shape == (130, 300)
    assert QA.scale.shape == (2, 3)
    assert QA.scale.dtype == jnp.float32
    assert (QA.ndim, QA.size) == (2, 39000)
    assert QA.nbytes == 130 * 300 + 4 * 2 * 3
    assert QA.dtype == jnp.bfloat16
    assert (STACK.shape, STACK.ndim, STACK.size) == ((4, 130, 300), 3, 4 * 39000)


def test_transposed_swaps_the_logical_axes_and_stores_the_same():
    qa = dataclasses.replace(STACK, transposed=True)
    assert qa.shape == (4, 300, 130)
    assert qa.qvalue.shape == (4, 130, 300)
    assert (qa.size, qa.nbytes, qa.ndim) == (STACK.size, STACK.nbytes, STACK.ndim)
    np.testing.assert_array_equal(qa.dequantize(), STACK.dequantize().mT)


@pytest.mark.parametrize(
    ("transposed", "shape"), [(False, (4, 13, 10, 3, 100)), (True, (4, 3, 100, 13, 10))]
)
def test_several_dimensions_in_and_out_are_axes_of_the_storage(transposed, shape):
    qa = dataclasses.replace(STACK, transposed=transposed, in_dims=(3, 100), out_dims=(13, 10))
    assert (qa.shape, qa.ndim, qa.size) == (shape, 5, STACK.size)
    matrices = dataclasses.replace(STACK, transposed=transposed)
    np.testing.assert_array_equal(qa.dequantize(), matrices.dequantize().reshape(shape))
    assert jax.tree.map(lambda x: x[1], qa).shape == shape[1:]
    assert "[" + ",".join(map(str, shape)) + "]" in repr(qa)


def test_dequantize_gives_the_original_dtype_by_default():
    assert QA.dequantize().dtype == jnp.bfloat16
    assert QA.dequantize(jnp.float32).dtype == jnp.float32
    assert differing(QA.dequantize(np.float32), blocked.dequantize(QA, jnp.float32)) == 0


def test_repr_says_what_it_is_in_one_line():
    text = "QuantizedArray(float8_e4m3fn[130,300], blocks 128x128, from bfloat16)"
    assert repr(QA) == text
    assert repr(dataclasses.replace(QA, transposed=True)) == text.replace("130,300", "300,130")
    assert "[130,300]" in repr(jax.eval_shape(lambda: QA))


@pytest.mark.parametrize(
    "leaf",
    [lambda x: None, lambda x: x.sharding, lambda x: P(), lambda x: x.shape, lambda x: "x"],
    ids=["none", "sharding", "spec", "shape", "text"],
)
def test_repr_takes_whatever_tree_map_puts_in(leaf):
    assert repr(jax.tree.map(leaf, QA)).startswith("QuantizedArray(")


def test_repr_takes_scalars():
    assert repr(jax.tree.map(jnp.sum, QA)).startswith("QuantizedArray(")


def test_equality_is_identity():
    """Arrays have no truth value; a set or a comparison of two trees must not ask for one."""
    same = QA
    assert same == QA
    assert QA != copy.deepcopy(QA)
    assert len({QA, STACK}) == 2


def test_nbytes_of_other_things():
    assert nbytes(np.zeros((3, 4), np.float16)) == 24
    assert nbytes(jax.ShapeDtypeStruct((3, 4), jnp.bfloat16)) == 24
    assert nbytes(jnp.zeros(())) == 4
    assert nbytes(jax.eval_shape(lambda: QA)) == QA.nbytes


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QA.scale = None  # pyright: ignore[reportAttributeAccessIssue]


# As a pytree --------------------------------------------------------------------------------------


def test_two_leaves_with_names():
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(QA)]
    assert paths == [".qvalue", ".scale"]


def test_static_fields_are_the_structure():
    for change in (
        {"block_size": (64, 64)},
        {"dtype": jnp.dtype(jnp.float32)},
        {"activation_scheme": "dynamic"},
        {"transposed": True},
        {"in_dims": (3, 100)},
        {"out_dims": (13, 10)},
    ):
        assert jax.tree.structure(dataclasses.replace(QA, **change)) != jax.tree.structure(QA)
    assert jax.tree.structure(quantized(4, 4)) == jax.tree.structure(QA)


def test_jit_in_and_out_and_no_recompile():
    traced = []

    @jax.jit
    def f(qa):
        traced.append(qa)
        assert isinstance(qa, QuantizedArray)
        return qa

    assert_same(f(QA), QA)
    f(dataclasses.replace(QA, scale=QA.scale * 2))
    assert len(traced) == 1


def test_vmap_over_a_leading_axis():
    halved = jax.vmap(lambda qa: dataclasses.replace(qa, scale=qa.scale / 2))(STACK)
    assert halved.shape == STACK.shape
    np.testing.assert_array_equal(halved.scale, STACK.scale / 2)
    shapes = []
    jax.vmap(lambda qa: shapes.append(qa.shape) or qa.dequantize())(STACK)
    assert shapes == [(130, 300)]


def test_scan_over_a_leading_axis_in_and_out():
    def body(carry, qa):
        return carry + 1, (qa, qa.dequantize())

    n, (out, w) = lax.scan(body, 0, STACK)
    assert n == 4
    assert_same(out, STACK)
    np.testing.assert_array_equal(w, STACK.dequantize())


def test_scan_carry_and_cond():
    out = lax.fori_loop(0, 3, lambda i, qa: qa, QA)
    assert_same(out, QA)
    assert_same(lax.cond(True, lambda: QA, lambda: QA), QA)


def test_tree_map_of_one_and_of_two():
    assert_same(jax.tree.map(lambda x: x, QA), QA)
    stack = jax.tree.map(lambda *xs: jnp.stack(xs), QA, QA)
    assert stack.shape == (2, 130, 300)
    assert_same(jax.tree.map(lambda x: x[1], stack), QA)


def test_eval_shape_has_shape_and_size_without_values():
    abstract = jax.eval_shape(lambda w: blocked.quantize(w), jnp.ones((3, 130, 300)))
    assert isinstance(abstract, QuantizedArray)
    assert (abstract.shape, abstract.ndim, abstract.size) == ((3, 130, 300), 3, 117000)
    assert abstract.nbytes == 117000 + 4 * 3 * 2 * 3
    assert jax.eval_shape(lambda qa: qa.dequantize(), abstract).dtype == jnp.float32


def test_device_put_and_get():
    device = jax.devices("cpu")[1]
    moved = jax.device_put(QA, device)
    assert_same(moved, QA)
    assert moved.qvalue.devices() == moved.scale.devices() == {device}
    host = jax.device_get(QA)
    assert isinstance(host.qvalue, np.ndarray)
    assert_same(host, QA)
    assert (host.shape, host.nbytes, repr(host)) == (QA.shape, QA.nbytes, repr(QA))


def test_donation_frees_the_argument_and_keeps_the_bytes():
    qa, expected = jax.tree.map(jnp.copy, STACK), STACK
    out = jax.jit(lambda qa: qa, donate_argnums=0)(qa)
    assert qa.qvalue.is_deleted()
    assert qa.scale.is_deleted()
    assert_same(out, expected)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(how):
    assert_same(how(QA), QA)
    assert_same(
        how(dataclasses.replace(QA, transposed=True)), dataclasses.replace(QA, transposed=1)
    )


# Sharding -----------------------------------------------------------------------------------------


def mesh(*shape: int) -> Mesh:
    return Mesh(np.array(jax.devices("cpu")[: int(np.prod(shape))]).reshape(shape), ("x", "y"))


@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P("x", "y"), P(("x", "y")), P()], ids=str)
def test_sharded_by_whole_blocks_gives_the_same_product(spec):
    qa = quantized(512, 512)
    sharding = NamedSharding(mesh(2, 2), spec)
    sharded = jax.device_put(qa, sharding)  # the same spec fits values and scales
    assert sharded.qvalue.sharding == sharded.scale.sharding == sharding
    assert_same(sharded, qa)
    x = jnp.ones((3, 512))
    y = jax.jit(matmul)(x, sharded)
    np.testing.assert_allclose(y, matmul(x, qa), rtol=1e-5, atol=1e-5)
    assert differing(jax.jit(blocked.dequantize)(sharded), blocked.dequantize(qa)) == 0


def test_quantizing_a_sharded_weight_gives_the_same_bytes():
    """Scales belong to the whole tensor, also where a block lies on two devices."""
    w = jnp.asarray(make_weight(normal, (192, 320), BF16, seed=1))
    expected = blocked.quantize(w)
    for spec in (P("x"), P(None, "x"), P("x", "y")):
        sharded = jax.device_put(w, NamedSharding(mesh(2, 2), spec))
        assert_same(blocked.quantize(sharded), expected)


def test_stack_sharded_over_its_leading_axis():
    sharded = jax.device_put(STACK, NamedSharding(mesh(4, 1), P("x")))
    assert_same(jax.jit(lambda qa: jax.tree.map(lambda x: x[2], qa))(sharded), quantized_layer(2))


def quantized_layer(i: int) -> QuantizedArray:
    return jax.tree.map(lambda x: x[i], STACK)


# Orbax --------------------------------------------------------------------------------------------


def test_orbax_round_trip(tmp_path):
    params = {"mlp": {"up": STACK, "norm": jnp.ones(3)}}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", params)
        checkpointer.wait_until_finished()
        abstract = jax.eval_shape(lambda: params)
        restored = checkpointer.restore(tmp_path / "params", abstract)
    assert_same(restored["mlp"]["up"], STACK)
    np.testing.assert_array_equal(restored["mlp"]["norm"], np.ones(3))


def test_orbax_restores_sharded(tmp_path):
    sharding = NamedSharding(mesh(4, 1), P("x"))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "qa", {"w": STACK})
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), {"w": STACK}
        )
        restored = checkpointer.restore(tmp_path / "qa", abstract)["w"]
    assert_same(restored, STACK)
    assert restored.qvalue.sharding == restored.scale.sharding == sharding
