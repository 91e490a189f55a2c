"""What `bench --tune` measures."""

import builders
import pytest

import jaxquant as jq
from jaxquant import bench as module


@pytest.mark.parametrize("scheme", ["dynamic", None])
def test_tuning_is_for_the_tokens_of_a_step_and_of_a_prefill(monkeypatch, scheme):
    tuned = []
    monkeypatch.setattr(
        module.tuning, "tune", lambda *args, **options: tuned.append((args, options))
    )
    monkeypatch.setattr(module, "_time", lambda *args: None)
    config = jq.QuantConfig(weight_block_size=builders.BLOCKS, activation_scheme=scheme)
    module.bench(builders.tiny_checkpoint(), config, batch=3, prompt_tokens=20, tune=True)
    weights = {(128, 64), (64, 64), (320, 64), (64, 160)}
    assert tuned == [
        (({(M, N, K) for N, K in weights},), {"weight_only": scheme is None}) for M in (3, 3 * 32)
    ]
