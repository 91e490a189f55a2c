"""Perplexity, KL and agreement against float64 numpy; what `compare` and `bench` run."""

import math

import builders
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.bench import bench
from jaxquant.comparison import compare
from jaxquant.errors import CheckpointError, JaxquantError
from jaxquant.evaluation import Evaluation, evaluate, windows
from jaxquant.text import Tokenizer

CONFIG = jq.QuantConfig(weight_block_size=builders.BLOCKS)
TEXT = "Alice was beginning to get very tired of sitting by her sister on the bank. " * 3


@pytest.fixture(scope="module")
def model():
    return builders.tiny_model()


@pytest.fixture(scope="module")
def fp8():
    return jq.from_pretrained(builders.tiny_checkpoint(), CONFIG, np.float32)


@pytest.fixture(scope="module")
def fp8_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8") / "checkpoint"
    jq.quantize_checkpoint(builders.tiny_checkpoint(), folder, CONFIG)
    return folder


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_scores_are_their_definitions(model, tmp_path):
    rng = np.random.default_rng(0)
    weights = builders.tensors(dtype=np.dtype(np.float32))
    head = weights["lm_head.weight"]
    weights["lm_head.weight"] = 1.5 * head + 0.05 * rng.standard_normal(head.shape, np.float32)
    other = jq.from_pretrained(builders.checkpoint(tmp_path / "w", weights), dtype=np.float32)
    tokens = rng.integers(0, 260, (3, 20)).astype(np.int32)
    got = evaluate(other, tokens, model)
    logp, reference = (log_softmax(m(tokens))[:, :-1] for m in (other, model))
    nll = -np.take_along_axis(logp, tokens[:, 1:, None], -1).mean()
    kl = (np.exp(reference) * (reference - logp)).sum(-1).mean()
    agreement = (logp.argmax(-1) == reference.argmax(-1)).mean()
    assert got.tokens == 3 * 19
    assert got.perplexity == pytest.approx(math.exp(nll), rel=1e-5)
    assert got.kl == pytest.approx(kl, rel=1e-3)
    assert got.agreement == pytest.approx(agreement, abs=1e-6)
    reverse = (np.exp(logp) * (logp - reference)).sum(-1).mean()
    assert abs(reverse - kl) > 0.05 * kl  # the test tells the two apart
    assert agreement < 1


def test_a_model_agrees_with_itself(model):
    tokens = np.arange(40, dtype=np.int32).reshape(2, 20)
    alone, itself = evaluate(model, tokens), evaluate(model, tokens, model)
    assert alone == Evaluation(38, alone.perplexity, None, None)
    assert itself.perplexity == pytest.approx(alone.perplexity, rel=1e-6)
    assert itself.kl == pytest.approx(0, abs=1e-6)
    assert itself.agreement == 1


@pytest.mark.parametrize(
    ("n", "size", "count", "shape"),
    [
        (100, 30, None, (3, 30)),
        (100, 30, 2, (2, 30)),
        (100, 100, None, (1, 100)),
        (50, 1024, None, (1, 50)),
        (50, 1024, 1, (1, 50)),
        (2, 2, None, (1, 2)),
    ],
)
def test_windows_are_consecutive(n, size, count, shape):
    tokens = windows(range(n), size, count)
    assert tokens.shape == shape
    assert tokens.dtype == np.int32
    assert np.array_equal(tokens.ravel(), np.arange(tokens.size))


@pytest.mark.parametrize(
    ("n", "size", "count", "message"),
    [
        (0, 30, None, "the text has 0 tokens; 1 windows of 30 tokens need more text"),
        (1, 30, None, "the text has 1 tokens; 1 windows of 30 tokens need more text"),
        (100, 30, 4, "the text has 100 tokens; 4 windows of 30 tokens need more text"),
        (50, 1024, 2, "the text has 50 tokens; 2 windows of 1024 tokens need more text"),
        (100, 1, None, "None windows of 1 tokens; allowed: at least 1 window of at least 2"),
        (100, -5, None, "None windows of -5 tokens"),
        (100, 30, 0, "0 windows of 30 tokens"),
        (100, 30, -1, "-1 windows of 30 tokens"),
    ],
)
def test_windows_that_cannot_be_cut(n, size, count, message):
    with pytest.raises(JaxquantError, match=message):
        windows(list(range(n)), size, count)


def test_windows_fit_the_context(model):
    with pytest.raises(
        JaxquantError, match="a window has 97 tokens; the context of the model is 96"
    ):
        evaluate(model, np.zeros((1, 97), np.int32))


@pytest.mark.parametrize("token", [-1, 260])
def test_tokens_are_in_the_vocabulary(model, token):
    with pytest.raises(JaxquantError, match=rf"token ids are .*{token}.*; allowed: 0 to 259"):
        evaluate(model, np.asarray([[1, token, 2]], np.int32))


def test_a_reference_has_the_same_vocabulary(model, tmp_path):
    other = builders.checkpoint(tmp_path / "w", config={**builders.CONFIG, "vocab_size": 100})
    with pytest.raises(JaxquantError, match="vocabularies of 260 and 100 tokens"):
        evaluate(model, np.zeros((1, 20), np.int32), jq.from_pretrained(other))


class TestCompare:
    def run(self, path, config=None, **options):
        result = compare(path, TEXT, config, dtype=np.float32, window=20, count=2, **options)
        return [(row.name, row.evaluation.kl) for row in result.rows], result

    def test_bf16_and_fp8(self, model, fp8):
        rows, result = self.run(builders.tiny_checkpoint(), CONFIG)
        assert [name for name, _ in rows] == ["float32", "FP8 W8A8"]
        tokens = windows(_encode(TEXT), 20, 2)
        assert result.rows[0].evaluation == evaluate(model, tokens)
        assert result.rows[1].evaluation == evaluate(fp8, tokens, model)
        assert [row.nbytes for row in result.rows] == [model.nbytes, fp8.nbytes]
        table = str(result)
        assert "perplexity" in table
        assert f"{result.rows[1].evaluation.kl:.4f}" in table
        assert "38 tokens predicted" in table

    def test_attention_in_fp8_is_a_row_of_its_own(self, model, fp8):
        dtype = "float8_e4m3fn"
        _, result = self.run(builders.tiny_checkpoint(), CONFIG, attention_dtype=dtype)
        assert [row.name for row in result.rows[1:]] == ["FP8 W8A8", "FP8 W8A8, FP8 attention"]
        expected = evaluate(fp8, windows(_encode(TEXT), 20, 2), model, dtype)
        assert result.rows[2].evaluation == expected
        assert expected != result.rows[1].evaluation

    def test_an_fp8_checkpoint_that_attends_in_fp8_is_compared_with_itself(self, fp8_checkpoint):
        rows, _ = self.run(fp8_checkpoint, attention_dtype="float8_e4m3fn")
        assert [name for name, _ in rows] == ["FP8 W8A8", "FP8 W8A8, FP8 attention"]
        assert rows[1][1] != pytest.approx(0, abs=1e-6)

    def test_another_dtype_of_attention_is_refused(self):
        with pytest.raises(JaxquantError, match="attention_dtype is 'fp8'; allowed: float8_e4m3fn"):
            self.run(builders.tiny_checkpoint(), CONFIG, attention_dtype="fp8")

    def test_an_fp8_checkpoint_alone(self, fp8_checkpoint):
        rows, _ = self.run(fp8_checkpoint)
        assert rows == [("FP8 W8A8", None)]

    def test_an_fp8_checkpoint_against_bf16_is_the_online_quantization(self, fp8_checkpoint):
        against, _ = self.run(fp8_checkpoint, against=builders.tiny_checkpoint())
        online, _ = self.run(builders.tiny_checkpoint(), CONFIG)
        assert against == online

    def test_what_is_asked_of_an_fp8_checkpoint_is_not_ignored(self, fp8_checkpoint):
        config = jq.QuantConfig(weight_block_size=builders.BLOCKS, activation_scheme=None)
        rows, _ = self.run(fp8_checkpoint, config)
        assert [name for name, _ in rows] == ["FP8 W8A8", "FP8 W8A16"]
        assert rows[1][1] != pytest.approx(0, abs=1e-4)
        with pytest.raises(CheckpointError, match=r"is FP8 already .*32x32.* but .*64x64"):
            self.run(fp8_checkpoint, jq.QuantConfig(weight_block_size=(64, 64)))

    def test_a_reference_may_be_fp8(self, fp8_checkpoint):
        rows, _ = self.run(builders.tiny_checkpoint(), CONFIG, against=fp8_checkpoint)
        assert rows == [("FP8 W8A8", None), ("FP8 W8A8", pytest.approx(0, abs=1e-6))]


def _encode(text):
    return Tokenizer.from_folder(builders.tiny_checkpoint()).encode(text)


class TestBench:
    def test_times_are_positive(self, fp8_checkpoint):
        result = bench(
            fp8_checkpoint,
            jq.QuantConfig(weight_block_size=builders.BLOCKS, activation_scheme=None),
            batch=2,
            prompt_tokens=4,
            new_tokens=4,
        )
        assert [t.name for t in result.timings] == ["FP8 W8A8", "FP8 W8A16"]
        for t in result.timings:
            assert t.load_seconds > 0
            assert t.prefill_tokens_per_second > 0
            assert t.decode_tokens_per_second == pytest.approx(2000 / t.decode_step_ms)
        assert "batch 2, 4 prompt and 4 new tokens" in str(result)
        assert result.to_dict()["timings"][0]["nbytes"] == result.timings[0].nbytes

    @pytest.mark.parametrize("sizes", [(0, 4, 4), (1, 0, 4), (1, 4, 1)])
    def test_sizes_are_positive(self, sizes):
        batch, prompt, new = sizes
        with pytest.raises(
            JaxquantError, match=f"batch {batch}, {prompt} prompt tokens, {new} new"
        ):
            bench(builders.tiny_checkpoint(), batch=batch, prompt_tokens=prompt, new_tokens=new)

    def test_sizes_fit_the_context(self):
        with pytest.raises(
            JaxquantError, match=r"90 prompt and 7 new tokens; the context .* is 96"
        ):
            bench(builders.tiny_checkpoint(), prompt_tokens=90, new_tokens=7)
