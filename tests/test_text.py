import json
import random
import re
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import jinja2
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings, strategies as st
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from jaxquant import chat_template
from jaxquant.chat_template import ChatTemplate, as_messages
from jaxquant.errors import CheckpointError, JaxquantError
from jaxquant.text import StopStrings, TextStream, Tokenizer

GOLDEN = json.loads(
    (Path(__file__).parent / "golden" / "chat_templates.json").read_text(encoding="utf-8")
)
SENTENCES = [
    "Hello world, how are you today?  Two spaces.",
    "The quick brown fox jumps over the lazy dog.\n\nNew paragraph.",
    "你好、世界。 Grüße aus Zürich, 21 °C.",
    "def f(x):\n    return x + 1\n",
] * 4
TEXTS = [
    "",
    " leading and trailing ",
    "Hello   world\n\n\ttabs",
    "你好、世界 — Grüße, Ünïcödé",
    "👩‍🚀 family 👨‍👩‍👧‍👦 flags 🇨🇭🇯🇵 skin 👍🏽",
    "عربى हिन्दी ไทย 日本語 한국어",
    "a replacement character � in the middle and at the end �",
    "e\u0301 combining, \u200b zero width, \U0010ffff the last",
]


def byte_level():
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    backend.add_tokens([AddedToken("<think>", special=False)])
    return backend


def llama(decoder=None):
    """As Llama 2's: spaces are ▁, unknown characters fall back to bytes, a text begins by <s>."""
    trainee = tokenizers.Tokenizer(models.BPE())
    trainee.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    trainee.train_from_iterator([s for s in SENTENCES if s.isascii()], trainer)
    model = json.loads(trainee.to_str())["model"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=model["vocab"],
            merges=[tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    backend.decoder = decoder or decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return backend


BACKENDS = {
    "byte_level": byte_level(),
    "llama": llama(),
    "gemma": llama(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    ),
    "metaspace": llama(decoders.Metaspace()),
}
SIZE = BACKENDS["byte_level"].get_vocab_size()
TOKENIZERS = {name: Tokenizer(backend) for name, backend in BACKENDS.items()}
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def write_checkpoint(folder, backend=None, **files):
    """tokenizer.json and further files; `name=` a dict is name.json, a str is name.jinja."""
    folder.mkdir(exist_ok=True)
    if backend is not None:
        backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        if isinstance(content, dict):
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        else:
            (folder / f"{name}.jinja").write_text(content, encoding="utf-8")
    return folder


def render(template, messages="hi", **extra):
    extra = {"add_generation_prompt": True} | extra
    return ChatTemplate(template, "chat_template.jinja").render(messages, **extra)


class TestTokenizer:
    @pytest.mark.parametrize("text", TEXTS)
    @pytest.mark.parametrize("name", ["byte_level", "llama"])
    def test_decode_gives_the_encoded_text_back(self, name, text):
        tokenizer = TOKENIZERS[name]
        assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_special_tokens_are_added_only_if_asked_for(self):
        tokenizer = TOKENIZERS["llama"]
        ids = tokenizer.encode("Hello")
        assert ids[0] == 1
        assert tokenizer.encode("Hello", add_special_tokens=False) == ids[1:]
        assert tokenizer.decode(ids, skip_special_tokens=False) == "<s> Hello"

    def test_decode_takes_arrays_and_ignores_ids_without_a_token(self):
        tokenizer = TOKENIZERS["byte_level"]
        ids = np.array([*tokenizer.encode("Hello"), 10**6], np.int32)
        assert tokenizer.decode(ids) == "Hello"

    @pytest.mark.parametrize("bad", [-1, 2**40])
    def test_decode_names_an_impossible_id(self, bad):
        tokenizer = TOKENIZERS["byte_level"]
        with pytest.raises(JaxquantError, match=rf"token id {bad}: ids lie in \[0, {SIZE}\)"):
            tokenizer.decode([1, bad])

    def test_encode_refuses_what_is_no_text(self):
        tokenizer = TOKENIZERS["byte_level"]
        with pytest.raises(JaxquantError, match="text: got bytes; it is a string"):
            tokenizer.encode(b"Hello")  # pyright: ignore[reportArgumentType]
        with pytest.raises(JaxquantError, match="lone surrogate"):
            tokenizer.encode("a\ud800")

    def test_truncation_and_padding_in_the_file_have_no_effect(self, tmp_path):
        backend = byte_level()
        backend.enable_truncation(2)
        backend.enable_padding(length=50)
        tokenizer = Tokenizer.from_folder(write_checkpoint(tmp_path, backend))
        assert tokenizer.decode(tokenizer.encode(SENTENCES[0])) == SENTENCES[0]
        assert len(tokenizer.encode("Hello world")) < 50

    def test_importing_the_package_alone_does_not_import_this(self):
        code = "import jaxquant, sys; sys.exit('tokenizers' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    def test_text_needs_no_jax(self):
        source = Path(chat_template.__file__)
        for path in (source, source.with_name("text.py")):
            assert "import jax" not in path.read_text(encoding="utf-8")


class TestFromFolder:
    def test_special_tokens_from_tokenizer_config(self, tmp_path):
        config = {
            "bos_token": "<|im_start|>",
            "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": False},
            "pad_token": None,
            "add_bos_token": True,
            "image_token": "<image>",
            "max_image_token": 5,
        }
        folder = write_checkpoint(tmp_path, byte_level(), tokenizer_config=config)
        tokenizer = Tokenizer.from_folder(folder)
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
        assert tokenizer.pad_token_id is None
        assert tokenizer.special_tokens["image_token"] == "<image>"
        assert tokenizer.vocab_size == SIZE + 1
        assert tokenizer.encode("<image>") == [SIZE]
        assert tokenizer.encode("a")[0] != 1
        assert not tokenizer.has_chat_template

    def test_no_config_files(self, tmp_path):
        tokenizer = Tokenizer.from_folder(str(write_checkpoint(tmp_path, byte_level())))
        assert tokenizer.vocab_size == SIZE
        assert tokenizer.eos_token_id is None

    def test_special_tokens_map_counts_without_added_tokens_decoder(self, tmp_path):
        older = {"eos_token": "<|endoftext|>", "additional_special_tokens": ["<extra>"]}
        write_checkpoint(
            tmp_path,
            byte_level(),
            tokenizer_config={"eos_token": "<|im_end|>"},
            special_tokens_map=older,
        )
        tokenizer = Tokenizer.from_folder(tmp_path)
        assert tokenizer.eos_token_id == 0
        assert tokenizer.encode("<extra>") == [SIZE]
        listed = {"2": {"content": "<|im_end|>", "special": True}}
        write_checkpoint(
            tmp_path, tokenizer_config={"eos_token": "<|im_end|>", "added_tokens_decoder": listed}
        )
        assert Tokenizer.from_folder(tmp_path).eos_token_id == 2

    def test_added_tokens_decoder_completes_and_overrides_tokenizer_json(self, tmp_path):
        listed = {
            f"{SIZE}": {"content": "<tool>", "special": True},
            f"{SIZE - 1}": {"content": "<think>", "special": True, "normalized": False},
        }
        write_checkpoint(tmp_path, byte_level(), tokenizer_config={"added_tokens_decoder": listed})
        tokenizer = Tokenizer.from_folder(tmp_path)
        assert tokenizer.encode("<think><tool>") == [SIZE - 1, SIZE]
        assert tokenizer.decode([SIZE - 1, SIZE]) == ""

    def test_an_eos_token_out_of_the_plain_vocabulary_becomes_special(self, tmp_path):
        write_checkpoint(tmp_path, byte_level(), tokenizer_config={"eos_token": "Ġ"})
        tokenizer = Tokenizer.from_folder(tmp_path)
        assert tokenizer.vocab_size == SIZE
        assert tokenizer.decode([tokenizer.eos_token_id]) == ""

    def test_missing_folder_and_file(self, tmp_path):
        with pytest.raises(CheckpointError, match="nowhere: no such folder"):
            Tokenizer.from_folder(tmp_path / "nowhere")
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file; copy it"):
            Tokenizer.from_folder(tmp_path)
        (tmp_path / "tokenizer.model").write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"only tokenizer\.model; .*save_pretrained\("):
            Tokenizer.from_folder(tmp_path)

    def test_broken_files(self, tmp_path):
        (tmp_path / "tokenizer.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer: EOF"):
            Tokenizer.from_folder(tmp_path)
        write_checkpoint(tmp_path, byte_level())
        config = tmp_path / "tokenizer_config.json"
        for broken, message in [
            (b"{", "not valid JSON"),
            (b"\xff\xfe{", "not valid JSON"),
            (b"[" * 100_000, "not valid JSON"),
            (b"[]", "got a list; it holds a JSON object"),
            (b'{"eos_token": 5}', "'eos_token': got 5; it is a string or a dict"),
            (b'{"eos_token": {"id": 5}}', "'eos_token': got .*; it is a string or a dict"),
            (b'{"extra_special_tokens": "x"}', "'extra_special_tokens': got 'x'"),
            (b'{"added_tokens_decoder": []}', "'added_tokens_decoder': got .*maps token ids"),
            (b'{"added_tokens_decoder": {"x": {}}}', "'added_tokens_decoder': got .*maps token"),
            (b'{"added_tokens_decoder": {"5": 1}}', r"'added_tokens_decoder'\['5'\]: got 1"),
            (
                b'{"eos_token": {"content": "a", "lstrip": 1}}',
                r"config\.json: 'eos_token': .*[bB]ool",
            ),
            (b'{"chat_template": 5}', "'chat_template': got a int; it is a Jinja template"),
            (b'{"chat_template": [5]}', r"'chat_template'\[0\]: got 5; an entry is a dict"),
        ]:
            config.write_bytes(broken)
            with pytest.raises(CheckpointError, match=message) as raised:
                Tokenizer.from_folder(tmp_path)
            assert "\n" not in str(raised.value)
            assert str(tmp_path) in str(raised.value)
        config.write_text("{}")
        (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
        with pytest.raises(CheckpointError, match=r"chat_template\.jinja: not UTF-8 text"):
            Tokenizer.from_folder(tmp_path)

    def test_where_the_chat_template_comes_from(self, tmp_path):
        def rendered(**extra):
            return Tokenizer.from_folder(tmp_path).apply_chat_template("hi", **extra)

        write_checkpoint(tmp_path, byte_level(), chat_template={"chat_template": "legacy"})
        assert rendered() == "legacy"
        write_checkpoint(tmp_path, tokenizer_config={"chat_template": "config"})
        assert rendered() == "config"
        listed = [{"name": n, "template": n} for n in ("default", "tool_use", "rag")]
        write_checkpoint(tmp_path, tokenizer_config={"chat_template": listed})
        assert rendered() == "default"
        assert rendered(tools=[]) == "tool_use"
        write_checkpoint(tmp_path, chat_template="file")
        assert rendered() == "file"
        write_checkpoint(tmp_path / "additional_chat_templates", tool_use="tools file")
        assert rendered(tools=[{}]) == "tools file"

    def test_no_chat_template(self, tmp_path):
        tokenizer = Tokenizer.from_folder(write_checkpoint(tmp_path, byte_level()))
        with pytest.raises(JaxquantError, match=r"no chat template; .*pass plain text"):
            tokenizer.apply_chat_template("hi")

    def test_encode_chat_leaves_the_special_tokens_to_the_template(self, tmp_path):
        template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
        config = {"bos_token": "<s>", "eos_token": "</s>"}
        write_checkpoint(tmp_path, llama(), tokenizer_config=config, chat_template=template)
        tokenizer = Tokenizer.from_folder(tmp_path)
        assert tokenizer.has_chat_template
        ids = tokenizer.encode_chat("Hello")
        assert ids.count(1) == 1
        assert (ids[0], ids[-1]) == (1, 2)
        text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])
        assert text == "<s>Hello</s>"
        assert ids == tokenizer.encode(text, add_special_tokens=False)


class TestTextStream:
    def check(self, tokenizer, ids, sizes=(1,), skip_special_tokens=True):
        stream = TextStream(tokenizer, skip_special_tokens=skip_special_tokens)
        pieces = []
        start = 0
        while start < len(ids):
            size = sizes[len(pieces) % len(sizes)]
            pieces.append(stream.push(ids[start : start + size]))
            start += size
        text = "".join(pieces)
        assert text + stream.finish() == tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens
        )
        return pieces

    @every_tokenizer
    @pytest.mark.parametrize("text", TEXTS)
    def test_pieces_add_up_to_the_text(self, tokenizer, text):
        self.check(tokenizer, tokenizer.encode(text))
        self.check(tokenizer, tokenizer.encode(text), sizes=(2, 3, 1))

    @every_tokenizer
    @given(text=st.text(max_size=30), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3))
    @settings(max_examples=60, deadline=None)
    def test_any_text_in_any_pieces(self, tokenizer, text, sizes):
        self.check(tokenizer, tokenizer.encode(text), sizes)

    @every_tokenizer
    @given(data=st.data(), skip=st.booleans())
    @settings(max_examples=120, deadline=None)
    def test_any_tokens_even_senseless_ones(self, tokenizer, data, skip):
        backend = tokenizer.backend
        byte_tokens = [backend.token_to_id(f"<0x{b:02X}>") for b in (0x20, 0xE4, 0xBD, 0xA0, 0xFF)]
        byte_chars = [backend.token_to_id(c) for c in "ä½łĊÃ©"]  # byte-level's names of bytes
        spaces = [backend.token_to_id(t) for t in ("▁", "▁▁", "Ġ", "�")]
        frequent = [i for i in (*byte_tokens, *byte_chars, *spaces, 0, 1) if i is not None]
        anything = st.integers(0, tokenizer.vocab_size + 3)
        ids = data.draw(st.lists(st.sampled_from(frequent) | anything, max_size=25))
        self.check(tokenizer, ids, skip_special_tokens=skip)

    @pytest.mark.parametrize("name", ["byte_level", "llama"])
    def test_incomplete_characters_are_held_back(self, name):
        tokenizer = TOKENIZERS[name]
        for piece in self.check(tokenizer, tokenizer.encode("ab 👩‍🚀 你好 cd")):
            assert "\ufffd" not in piece

    def test_text_comes_at_once_where_it_is_certain(self):
        tokenizer = TOKENIZERS["byte_level"]
        ids = tokenizer.encode(SENTENCES[1])
        assert self.check(tokenizer, ids) == [tokenizer.decode([i]) for i in ids]

    def test_only_the_first_leading_space_is_dropped(self):
        tokenizer = TOKENIZERS["llama"]
        ids = tokenizer.encode("Hello world how are")
        assert [p for p in self.check(tokenizer, ids) if p.startswith(" ")]

    def test_finish_shows_an_incomplete_character_as_decode_does(self):
        tokenizer = TOKENIZERS["llama"]
        ids = tokenizer.encode("a")
        ids += [tokenizer.backend.token_to_id(token) for token in ("<0xE4>", "<0xBD>")]
        stream = TextStream(tokenizer)
        assert stream.push(ids) == "a"
        assert stream.finish() == "\ufffd\ufffd"

    def test_nothing(self):
        stream = TextStream(TOKENIZERS["llama"])
        assert stream.push([]) == ""
        assert stream.push([1, -5]) == ""
        assert stream.finish() == ""

    @every_tokenizer
    def test_work_per_token_does_not_grow(self, tokenizer, monkeypatch):
        decoded = []
        plain = TextStream._decode
        monkeypatch.setattr(
            TextStream, "_decode", lambda self, ids: decoded.append(len(ids)) or plain(self, ids)
        )
        backend = tokenizer.backend
        bad_byte = backend.token_to_id("<0xFF>") or backend.token_to_id("ÿ")
        space = backend.token_to_id("▁") or backend.token_to_id("Ġ")
        text = tokenizer.encode("Hello 你好 👩‍🚀 " * 100)
        for ids in (text, [bad_byte] * 2000, [space] * 2000, [space, *text]):
            decoded.clear()
            self.check(tokenizer, ids)
            assert sum(decoded) < 20 * len(ids)


class TestStopStrings:
    def stream(self, stops, pieces):
        stop = StopStrings(stops)
        out = []
        for piece in pieces:
            text, stopped = stop.push(piece)
            out.append(text)
            if stopped:
                break
        return out, stop.finish()

    def test_cuts_before_the_stop(self):
        assert self.stream(["</s>"], ["Hello </", "s> more"]) == (["Hello ", ""], "")

    def test_holds_back_only_what_may_become_a_stop(self):
        assert self.stream(["\n\nQ:"], ["a\n", "b\n", "\n", "Q"]) == (
            ["a", "\nb", "", ""],
            "\n\nQ",
        )

    def test_the_first_complete_one_counts_and_the_longest_of_those(self):
        assert self.stream(["abcd", "bc"], ["xabcd"]) == (["xa"], "")
        assert self.stream(["bc", "abc"], ["xabcd"]) == (["x"], "")

    def test_nothing_comes_after_the_stop(self):
        stop = StopStrings("END")
        assert stop.push("a END b") == ("a ", True)
        assert stop.push("c") == ("", True)
        assert stop.finish() == ""

    def test_no_stops(self):
        assert self.stream([], ["a", "b"]) == (["a", "b"], "")

    @pytest.mark.parametrize("bad", ["", [""], ["a", ""], [None]])
    def test_bad_stops(self, bad):
        with pytest.raises(JaxquantError, match=r"stop string: got .*; it is a string, not empty"):
            StopStrings(bad)

    @given(
        text=st.text("ab", max_size=12),
        stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
        seed=st.integers(0, 2**16),
    )
    @settings(max_examples=300, deadline=None)
    def test_the_result_does_not_depend_on_the_pieces(self, text, stops, seed):
        ends = [text.find(s) + len(s) for s in stops if s in text]
        expected = text
        if ends:
            expected = text[: min(ends)]
            expected = expected[: -max(len(s) for s in stops if expected.endswith(s))]
        cuts = sorted(random.Random(seed).choices(range(len(text) + 1), k=4))
        pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        out, rest = self.stream(stops, pieces)
        assert "".join(out) + rest == expected


class TestChatTemplate:
    @pytest.mark.parametrize(
        "case",
        GOLDEN["cases"],
        ids=[f"{c['template']}-{c['conversation']}-{len(c['extra'])}" for c in GOLDEN["cases"]],
    )
    def test_renders_as_transformers_does(self, case, monkeypatch):
        class Clock:
            @staticmethod
            def now():
                return datetime(2024, 7, 26, 12, 30)

        monkeypatch.setattr(chat_template, "datetime", Clock)
        template = ChatTemplate(GOLDEN["templates"][case["template"]], case["template"])
        messages = GOLDEN["conversations"][case["conversation"]]
        extra = GOLDEN["special_tokens"] | case["extra"]
        if "error" in case:
            with pytest.raises(JaxquantError) as raised:
                template.render(messages, **extra)
            place, message = str(raised.value).split(": ", 1)
            assert message == case["error"]
            assert re.fullmatch(rf"chat template {case['template']}, line \d+", place)
        else:
            assert template.render(messages, **extra) == case["rendered"]

    def test_messages_are_left_as_they_are(self):
        messages = [{"role": "user", "content": None, "tool_calls": [], "reasoning": "r"}]
        text = "{{ messages[0].reasoning_content }} {{ 'content' in messages[0] }}"
        assert render(text, messages) == "r False"
        assert messages == [{"role": "user", "content": None, "tool_calls": [], "reasoning": "r"}]

    def test_subclasses_of_plain_types_become_plain(self):
        class Sly(str):
            def open(self):
                raise AssertionError

        messages = [{"role": "user", "content": Sly("hi")}]
        assert render("{{ messages[0].content.open is defined }}", messages) == "False"
        assert type(as_messages(messages)[0]["content"]) is str

    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            ([], "messages: got an empty list; pass a string or"),
            (5, "messages: got int; pass a string or"),
            ({"role": "user", "content": "x"}, "messages: got dict"),
            (["hi"], r"messages\[0\]: got str; each message is a dict"),
            ([{"content": "hi"}], r"messages\[0\]\['role'\]: got None; it is a string such as"),
            ([{"role": "user"}], r"messages\[0\]\['content'\]: got None; it is a string or a"),
            ([{"role": "user", "content": 5}], r"messages\[0\]\['content'\]: got 5"),
            (
                [{"role": "user", "content": [{"image": np.zeros(2)}]}],
                r"messages\[0\]\['content'\]\[0\]\['image'\]: got ndarray; chat templates take",
            ),
        ],
    )
    def test_malformed_messages(self, messages, message):
        with pytest.raises(JaxquantError, match=message):
            render("", messages)

    def test_a_tool_that_is_a_function(self):
        with pytest.raises(JaxquantError, match=r"tools\[0\]: got builtin_function"):
            render("", tools=[print])

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("\n{% if %}", "chat template chat_template.jinja, line 2: Expected an expression"),
            ("\n\n{{ nothing.at.all }}", "chat template chat_template.jinja, line 3: 'nothing' is"),
            ("{{ 1 / 0 }}", "line 1: ZeroDivisionError: division by zero"),
            ("{{ raise_exception('no\nway') }}", "chat_template.jinja, line 1: no way"),
            ("{% include 'x' %}", "chat_template.jinja, line 1: "),
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ],
    )
    def test_a_broken_template_is_one_line_with_its_place(self, template, message):
        with pytest.raises(JaxquantError) as raised:
            render(template)
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize(
        "template",
        [
            "{{ ''.__class__ }}",
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ ''['__class__'] }}",
            "{{ '' | attr('__class__') }}",
            "{{ ['']|map(attribute='__class__')|list }}",
            "{{ '{0.__class__}'.format(1) }}",
            "{{ ('{a.__class__}'|string).format_map({'a': 1}) }}",
            "{{ ['{0.__class__}']|map('format')|list }}{{ ''.format.__globals__ }}",
            "{{ ('{0.__class__}'|attr('format'))(1) }}",  # jinja2 before 3.1.6 lets this pass
            "{{ raise_exception.__globals__ }}",
            "{{ strftime_now.__code__ }}",
            "{{ self.__init__.__globals__ }}",
            "{{ cycler.__init__.__globals__.os.system('true') }}",
            "{{ dict.__class__ }}",
            "{{ namespace(__class__=1) }}",
            "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
            "{{ messages.append(1) }}",
            "{{ messages[0].update(role='x') }}",
            "{{ messages[0].pop('role') }}",
        ],
    )
    def test_leaving_the_sandbox(self, template):
        with pytest.raises(JaxquantError, match=r"chat template chat_template\.jinja: unsafe"):
            render(template)

    @pytest.mark.parametrize(
        "template",
        [
            "{{ 'a' * 10**10 }}",
            "{% set n = 10**10 %}{{ n * 'a' }}",
            "{{ [0] * 10**10 }}",
            "{{ 9 ** 9 ** 9 ** 9 ** 9 }}",
            "{% for i in range(10**9) %}{% endfor %}",
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
            "{% set r = range(99999)|list %}"
            "{% for i in r recursive %}{% if r %}{{ loop(r) }}{% endif %}{% endfor %}",
            "{% set ns = namespace(x='ab') %}"
            "{% for i in range(64) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
            "{% set ns = namespace(x='ab') %}"
            "{% for i in range(64) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "{% set ns = namespace(x='ab') %}"
            "{% for i in range(64) %}{% set ns.x = [ns.x, ns.x]|join %}{% endfor %}",
            "{% set ns = namespace(x=['ab']) %}"
            "{% for i in range(64) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
            "{% set ns = namespace(x=['ab']) %}"
            "{% for i in range(64) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x|tojson }}",
            "{% set ns = namespace(x=9) %}"
            "{% for i in range(64) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
            "{% set ns = namespace(x='ab') %}"
            "{% for i in range(64) %}{% set ns.x = ns.x.replace('a', ns.x) %}{% endfor %}",
            "{% set ns = namespace(x='ab') %}{% for i in range(64) %}"
            "{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = x %}{% endfor %}",
            "{{ 'a'.ljust(10**10) }}",
            "{{ 'a'|center(10**10) }}",
            "{{ 'a'|indent(10**10, true) }}",
            "{{ '{:>9999999999}'.format(1) }}",
            "{{ '{:>{w}}'.format(1, w=10**10) }}",
            "{{ '%9999999999d' % 1 }}",
            "{{ '%*d' % (10**10, 1) }}",
            "{{ '%9999999999d'|format(1) }}",
            "{{ [1]|batch(10**10, 0)|list }}",
            "{{ [[1]]|tojson(indent=10**10) }}",
            "{{ range(90000)|map('loop steps', -10**9)|list }}" + "{{ 'a' * 10**8 }}" * 2,
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
            "{{ f(90) }}",
        ],
    )
    def test_endless_templates_and_memory_bombs_end_soon(self, template, monkeypatch):
        monkeypatch.setattr(chat_template, "_BUDGET", chat_template._BUDGET // 10)
        began = time.perf_counter()
        with pytest.raises(JaxquantError, match=r"stopped: |Range too big|RecursionError"):
            render(template)
        assert time.perf_counter() - began < 5

    def test_the_budget_is_one_render_s(self):
        template = ChatTemplate("{{ messages[0].content * 4 }}", "t")
        for _ in range(20):
            assert len(template.render("x" * 2_000_000, add_generation_prompt=True)) == 8_000_000

    @pytest.mark.parametrize(
        "template",
        [
            "{{ text + text }}{{ text ~ text }}",
            "{{ text.split(text) | length }}{{ text.startswith(text) }}",
            "{{ text | truncate(99999) }}{{ text | indent(4) }}",
            "{{ 'a %s b'.replace('%s', text) }}{{ (text + '@').replace('@', text) }}",
            "{{ '{}'.format(text) }}{{ '%s' % text }}",
            "{{ number | string }}{{ number | tojson }}{{ '%d %s' % (number, number) }}",
            "{{ '{} {:,}'.format(number, number) }}{{ [number] | join }}{{ number * number }}",
            "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(number) }}{{ number % 7 }}{{ -number }}",
        ],
    )
    def test_long_texts_and_large_numbers_are_no_bombs(self, template):
        text = "Call 01234567890: 12345678901, %9999999999d {:>9999999999} " * 10_000
        plain = jinja2.Environment().from_string(template)
        number = 1_700_000_000_000
        assert render(template, text=text, number=number) == plain.render(text=text, number=number)

    def test_a_long_conversation_fits_the_budget(self):
        turn = [
            {"role": "user", "content": "x" * 4000},
            {"role": "assistant", "content": "y" * 4000},
        ]
        messages = turn * 500
        for name in ("chatml", "llama2", "llama3", "mistral", "qwen"):
            text = render(GOLDEN["templates"][name], messages, bos_token="", eos_token="")
            assert len(text) > 4_000_000
