"""Prompts in, text out: batches, conversations, stops, streams, and what is refused."""

import shutil
from typing import Any

import builders
import pytest

import jaxquant as jq
from jaxquant.errors import CheckpointError, JaxquantError
from jaxquant.pipelines import Pipeline, Response
from jaxquant.text import Tokenizer

OPTIONS: dict[str, Any] = {"max_new_tokens": 24}
# A tiny model's most likely tokens repeat themselves; sampled ones are of all kinds.
SAMPLED = {**OPTIONS, "temperature": 1.5, "seed": 5}


@pytest.fixture(scope="module")
def pipe():
    return Pipeline(builders.tiny_model(), Tokenizer.from_folder(builders.tiny_checkpoint()))


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = builders.checkpoint(
        tmp_path_factory.mktemp("chat"), tokenizer=True, chat_template=builders.CHAT_TEMPLATE
    )
    return Pipeline(builders.tiny_model(), Tokenizer.from_folder(folder))


def test_a_string_gives_a_response(pipe):
    response = pipe("Hello", **OPTIONS)
    assert isinstance(response, Response)
    tokens = pipe.tokenizer.encode("Hello")
    (expected,) = builders.tiny_model().generate([tokens], **OPTIONS)
    assert response.token_ids == expected
    assert response.text == pipe.tokenizer.decode(expected)
    assert response.input_token_len == len(tokens) == 5
    assert response.generate_token_len == len(expected) == 24
    assert response.finish_reason == "length"


def test_a_list_gives_a_list(pipe):
    prompts = ["Hello", "Hi, pls intro yourself", "Shanghai is"]
    assert pipe(prompts, **OPTIONS) == [pipe(prompt, **OPTIONS) for prompt in prompts]
    assert pipe(tuple(prompts[:1]), **OPTIONS) == [pipe(prompts[0], **OPTIONS)]


def test_from_a_folder():
    pipe = jq.pipeline(
        builders.tiny_checkpoint(), jq.QuantConfig(weight_block_size=builders.BLOCKS)
    )
    assert pipe.model.quant_config is not None
    assert not pipe.chat
    assert len(pipe(["Hi, pls intro yourself", "Shanghai is"], max_new_tokens=4)) == 2


def test_of_a_loaded_model(pipe):
    assert jq.pipeline(builders.tiny_model())("Hello", **OPTIONS) == pipe("Hello", **OPTIONS)
    with pytest.raises(JaxquantError, match="the model is loaded already"):
        jq.pipeline(builders.tiny_model(), jq.QuantConfig())


def test_conversations_go_through_the_template(chat):
    conversation = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    text = (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = chat.tokenizer.encode(text)
    assert chat.encode(conversation) == ids
    one = chat(conversation, **OPTIONS)
    assert one.input_token_len == len(ids)
    hi = [{"role": "user", "content": "Hi"}]
    assert chat([conversation, "Hi", hi], **OPTIONS) == [one, *[chat("Hi", **OPTIONS)] * 2]
    assert chat(hi, **OPTIONS) == chat("Hi", **OPTIONS)


def test_chat_can_be_turned_off(chat, pipe):
    plain = Pipeline(chat.model, chat.tokenizer, chat=False)
    assert chat.chat
    assert plain("Hi", **OPTIONS) == pipe("Hi", **OPTIONS)
    with pytest.raises(JaxquantError, match="a conversation came, but this pipeline takes plain"):
        plain([{"role": "user", "content": "Hi"}])


def test_chat_without_a_template_is_refused(pipe):
    with pytest.raises(JaxquantError, match="chat=True, but the checkpoint has no chat template"):
        jq.pipeline(builders.tiny_checkpoint(), chat=True)


@pytest.mark.parametrize("options", [OPTIONS, SAMPLED])
def test_the_pieces_of_a_stream_add_up(pipe, options):
    pieces = list(pipe.stream("Hello", **options))
    assert "".join(pieces) == pipe("Hello", **options).text
    assert all(pieces)
    assert len(pieces) > 1


def test_a_stream_can_be_left(pipe):
    for _ in pipe.stream("Hello", **SAMPLED):
        break


def test_text_waits_for_whole_characters(pipe, monkeypatch):
    """Bytes of one character in tokens of their own, over the borders of chunks."""
    tokens = pipe.tokenizer.encode("ab" + "你好🚀" * 3)
    fake_generation(monkeypatch, tokens)
    for size in (1, 2, 3, 8):
        pieces = list(pipe.stream("x", chunk_size=size))
        assert "".join(pieces) == "ab" + "你好🚀" * 3
        assert "\ufffd" not in "".join(pieces)


def test_an_incomplete_character_at_the_end_is_marked(pipe, monkeypatch):
    fake_generation(monkeypatch, pipe.tokenizer.encode("ab你")[:-1])
    assert pipe("x").text == "ab\ufffd"


def fake_generation(monkeypatch, *rows, size=None):
    """What the model says is given; `chunk_size` is an option of the stream."""
    from jaxquant import generation, pipelines

    sizes = []

    def stream(model, prompts, sampling, *, chunk, **_):
        chunk = size or (sizes[-1] if sizes else chunk)
        for start in range(0, max(map(len, rows)), chunk):
            yield [row[start : start + chunk] for row in rows]

    def known(sampling):
        sizes.append(sampling.pop("chunk_size", 3))
        return {}

    monkeypatch.setattr(generation, "stream", stream)
    monkeypatch.setattr(pipelines, "_known", known)


@pytest.mark.parametrize("size", range(1, 8))
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("STOP", "say "),
        (["never", "OP n"], "say ST"),
        (["y S", "STOP"], "sa"),
        (["s"], ""),
        ("nowhere", "say STOP now STO"),
        (["STOPPED"], "say STOP now STO"),
        ("now STO", "say STOP "),
    ],
)
def test_stop_strings_over_the_borders_of_chunks(pipe, monkeypatch, size, stop, expected):
    tokens = pipe.tokenizer.encode("say STOP now STO")
    fake_generation(monkeypatch, tokens, size=size)
    response = pipe("x", stop=stop)
    assert response.text == expected
    stopped = expected != "say STOP now STO"
    assert response.finish_reason == ("stop" if stopped else "length")
    # The tokens up to the one that completed the stop string.
    text = pipe.tokenizer.decode(response.token_ids)
    assert text.startswith(expected)
    assert (len(text) < len(tokens)) == (stopped and stop != "now STO")
    assert "".join(pipe.stream("x", stop=stop)) == expected


def test_each_row_stops_for_itself(pipe, monkeypatch):
    encode = pipe.tokenizer.encode
    end = builders.CONFIG["eos_token_id"]
    rows = [encode("one|two"), [*encode("thr"), end], encode("fourfour")]
    fake_generation(monkeypatch, *rows)
    a, b, c = pipe(["x", "y", "z"], stop="|")
    assert (a.text, a.finish_reason, a.token_ids) == ("one", "stop", encode("one|"))
    assert (b.text, b.finish_reason, b.token_ids) == ("thr", "stop", [*encode("thr"), end])
    assert (c.text, c.finish_reason) == ("fourfour", "length")


@pytest.mark.parametrize("option", ["cache_dtype", "attention_dtype"])
def test_a_cache_and_attention_in_fp8(pipe, option):
    options = {**OPTIONS, option: "float8_e4m3fn"}
    (expected,) = pipe.model.generate([pipe.tokenizer.encode("Hello")], **options)
    assert pipe("Hello", **options).token_ids == expected


def test_stop_tokens_end_the_text_and_are_not_in_it(pipe):
    free = pipe("Hello", **SAMPLED, stop_tokens=())
    stop = free.token_ids[10]
    assert stop not in free.token_ids[:10]
    response = pipe("Hello", **SAMPLED, stop_tokens=[stop])
    assert response.token_ids == free.token_ids[:11]
    assert response.finish_reason == "stop"
    assert response.text == pipe.tokenizer.decode(free.token_ids[:10])


def test_the_tokenizers_end_of_text_stops_if_the_checkpoint_names_none(pipe, monkeypatch):
    monkeypatch.setattr(pipe.model, "hf_config", {})
    end = pipe.tokenizer.eos_token_id
    assert end == 257
    fake_generation(monkeypatch, [*pipe.tokenizer.encode("ab"), end, 65])
    assert (pipe("x").text, pipe("x").finish_reason) == ("ab", "stop")


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("Hi", {"max_tokens": 5}, "no such option: max_tokens; allowed: max_new_tokens, stop"),
        ("Hi", {"temperature": -1}, "temperature is -1; allowed: a number"),
        ("Hi", {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ("Hi", {"stop": ""}, "stop string: got ''"),
        ("Hi", {"stop": [5]}, "stop string: got 5"),
        ("", {}, "prompt 0 is empty"),
        (["Hi", ""], {}, "prompt 1 is empty"),
        ([], {}, "no prompts came"),
        ("Hi " * 40, {}, "prompt 0 has 120 tokens; the context of the model is 96"),
        ({"role": "user", "content": "Hi"}, {}, "prompts: got dict; pass a string"),
        ([5], {}, "plain text"),
    ],
)
def test_what_cannot_be_answered(pipe, prompts, options, message, unchecked):
    with pytest.raises(JaxquantError, match=message):
        pipe(prompts, **options)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([{"content": "Hi"}], r"messages\[0\]\['role'\]"),
        ([[{"role": "user"}]], r"messages\[0\]\['content'\]"),
        ([[]], "messages: got an empty list"),
        ([5], "messages: got int"),
    ],
)
def test_malformed_conversations(chat, prompts, message, unchecked):
    with pytest.raises(JaxquantError, match=message):
        chat(prompts)


def test_no_tokenizer_is_said_before_the_model_loads(tmp_path):
    folder = builders.checkpoint(tmp_path / "w")
    (folder / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file"):
        jq.pipeline(folder)


def test_a_tokenizer_of_another_model(tmp_path):
    """Its ids are outside the vocabulary."""
    folder = builders.checkpoint(tmp_path / "w", config={**builders.CONFIG, "vocab_size": 100})
    shutil.copy(builders.tiny_checkpoint() / "tokenizer.json", folder)
    with pytest.raises(JaxquantError, match=r"prompt 0 has the token id .*; allowed: 0 to 99"):
        jq.pipeline(folder)("你好")
