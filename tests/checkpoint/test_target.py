"""Where tensors go: what each device has of them, and programs that are there before they come."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import jaxquant as jq
from jaxquant.checkpoint import target
from jaxquant.checkpoint.target import Destination, Part, Strip, Target

CONFIG = jq.QuantConfig(weight_block_size=(8, 8))
BF16 = jnp.dtype(jnp.bfloat16)


def make(shape, spec=None, config=None, devices=4):
    param: Any = nnx.Param(jax.ShapeDtypeStruct(shape, BF16))
    mesh = Mesh(np.array(jax.devices()[:devices]), ("x",))
    sharding = None if spec is None else NamedSharding(mesh, spec)
    return param, Target(param, config, BF16, sharding)


def test_one_device_has_whole_tensors():
    _, whole = make((2, 64, 16))
    strips = Destination(whole, (1,), 32).strips((16, 16))
    assert strips == [Strip(slice(0, 16), (Part(slice(None, None), (None,)),))]


def test_rows_of_a_tensor_lie_where_their_parameters_do():
    """The second of two fused projections: 24 rows behind 16, on devices that have 10 each."""
    _, shards = make((2, 40, 16), P(None, "x"))
    place = Destination(shards, (1,), 16)
    strips = place.strips((24, 16))
    devices = jax.devices()
    assert [(s.rows, s.parts[0].devices) for s in strips] == [
        (slice(0, 4), (devices[1],)),
        (slice(4, 14), (devices[2],)),
        (slice(14, 24), (devices[3],)),
    ]
    assert [place.start(devices[i + 1], s.rows).tolist() for i, s in enumerate(strips)] == [
        [1, 6],
        [1, 0],
        [1, 0],
    ]


def test_columns_are_read_together():
    _, shards = make((64, 16), P(None, "x"))
    (strip,) = Destination(shards, (), 0).strips((64, 16))
    assert strip.columns == slice(0, 16)
    assert [part.columns for part in strip.parts] == [slice(i, i + 4) for i in range(0, 16, 4)]


def test_copies_are_read_once():
    _, shards = make((3, 16), P())
    (strip,) = Destination(shards, (2,), 0).strips((16,))
    assert strip.parts == (Part(slice(None, None), tuple(jax.devices()[:4])),)


@pytest.mark.parametrize("spec", [None, P(None, "x")])
@pytest.mark.parametrize("config", [None, CONFIG])
def test_what_is_compiled_ahead_is_what_runs(monkeypatch, caplog, spec, config):
    monkeypatch.setattr(target, "_host_zeros", jnp.zeros)  # as on devices with their own memory
    param, stack = make((2, 32, 16), spec, config, devices=2)
    place = Destination(stack, (1,), 0)
    w = np.arange(32 * 16, dtype=np.float32).reshape(32, 16).astype(BF16)
    for strip in place.strips(w.shape):
        for _, device in strip.holders:
            rows = w[strip.rows]
            place.compile(device, jax.ShapeDtypeStruct(rows.shape, BF16), config, BF16)
            rows, start = jax.device_put((rows, place.start(device, strip.rows)), device)
            with jax.log_compiles():
                place.put(device, rows, start, config, BF16)
    assert "Finished XLA compilation" not in caplog.text
    stack.finish()
    value = param.get_value()
    if config is None:
        assert np.asarray(value[1]).tobytes() == w.tobytes()
        assert not np.asarray(value[0]).any()
    else:
        expected = jq.quantize(w, config)
        assert np.asarray(value.qvalue[1]).tobytes() == np.asarray(expected.qvalue).tobytes()
        assert np.asarray(value.scale[1]).tobytes() == np.asarray(expected.scale).tobytes()
