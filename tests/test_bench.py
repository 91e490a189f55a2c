"""What `bench` measures."""

from typing import Any

import builders
import pytest

import jaxquant as jq
from jaxquant import bench as module
from jaxquant.language_model import LanguageModel


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


def test_a_cache_and_attention_in_fp8_are_rows_of_their_own(monkeypatch):
    asked = []

    def generate(self, prompts, *, max_new_tokens, stop_tokens, cache_dtype, attention_dtype):
        asked.append((self.quant_config is not None, cache_dtype, attention_dtype))

    monkeypatch.setattr(LanguageModel, "generate", generate)
    config = jq.QuantConfig(weight_block_size=builders.BLOCKS)
    sizes = {"prompt_tokens": 4, "new_tokens": 3}
    e4m3 = "float8_e4m3fn"
    rows: list[tuple[Any, list]] = [
        ({}, []),
        ({"cache_dtype": e4m3}, [("FP8 cache", e4m3, None)]),
        ({"attention_dtype": e4m3}, [("FP8 attention", None, e4m3)]),
        (
            {"cache_dtype": e4m3, "attention_dtype": e4m3},
            [("FP8 cache", e4m3, None), ("FP8 cache, FP8 attention", e4m3, e4m3)],
        ),
    ]
    for options, expected in rows:
        asked.clear()
        result = module.bench(builders.tiny_checkpoint(), config, **sizes, **options)
        with_dtypes = [(True, *dtypes) for _, *dtypes in expected]
        both = [(False, None, None), (True, None, None)]
        assert list(dict.fromkeys(asked)) == both + with_dtypes
        names = [f"FP8 W8A8, {name}" for name, *_ in expected]
        assert [t.name for t in result.timings] == ["bfloat16", "FP8 W8A8", *names]
