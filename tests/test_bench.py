"""What `bench` measures."""

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


def test_a_cache_in_fp8_is_that_of_a_row_of_its_own(monkeypatch):
    asked = []

    def generate(self, prompts, *, max_new_tokens, stop_tokens, cache_dtype):
        asked.append((self.quant_config is not None, cache_dtype))

    monkeypatch.setattr(LanguageModel, "generate", generate)
    config = jq.QuantConfig(weight_block_size=builders.BLOCKS)
    sizes = {"prompt_tokens": 4, "new_tokens": 3}
    module.bench(builders.tiny_checkpoint(), config, **sizes, cache_dtype="float8_e4m3fn")
    assert list(dict.fromkeys(asked)) == [(False, None), (True, None), (True, "float8_e4m3fn")]
