"""Between text and token ids: a checkpoint's tokenizer, streamed decoding, stop strings."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from .chat_template import ChatTemplate
from .errors import CheckpointError, JaxquantError

_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_TOKEN_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
# Files of other tokenizers, which transformers can convert.
_CONVERTIBLE = ("tokenizer.model", "tekken.json", "tiktoken.model", "spiece.model", "vocab.json")


class Tokenizer:
    """A checkpoint's tokenizer with its special tokens and chat template; see `from_folder`."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, ChatTemplate] | None = None,
        source: str = "tokenizer",
    ):
        """Of the parts.

        `special_tokens` maps names to tokens ("eos_token": "</s>"), `chat_templates` maps
        "default" and "tool_use" to templates, `source` is the folder that errors name.
        """
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self._chat_templates = dict(chat_templates or {})
        self._source = source

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer of the checkpoint in the folder `path`, as transformers 5 reads it.

        Reads tokenizer.json (required), tokenizer_config.json, special_tokens_map.json and the
        chat template: chat_template.jinja and additional_chat_templates/*.jinja go before
        tokenizer_config.json's "chat_template", that before chat_template.json. Raises
        CheckpointError that names the file that is missing or broken, and its field.
        """
        folder = Path(path)
        backend = _read_backend(folder)
        config = _read_json(folder / "tokenizer_config.json")
        special_tokens = _add_special_tokens(backend, config, folder)
        return cls(backend, special_tokens, _read_chat_templates(config, folder), str(folder))

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token_id(self) -> int | None:
        """The id of the token that begins a text, None without one."""
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The id of the token that ends a text, None without one."""
        return self._special_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """The id of the padding token, None without one."""
        return self._special_id("pad_token")

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` has a template to apply."""
        return "default" in self._chat_templates

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of `text`, with the tokens that the checkpoint puts around a text.

        Text out of a chat template brings those tokens itself: use `encode_chat`. Raises
        JaxquantError for what is no text.
        """
        if not isinstance(text, str):
            raise JaxquantError(f"text: got {type(text).__name__}; it is a string")
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:  # the only str that the tokenizer refuses
            raise JaxquantError(
                "text: it has a lone surrogate, which UTF-8 cannot hold; "
                "repair it with text.encode(errors='replace').decode()"
            ) from None

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of the token ids `ids`; ids without a token give nothing.

        Raises JaxquantError for a negative id.
        """
        ids = [int(i) for i in ids]
        try:
            return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except OverflowError:
            bad = next(i for i in ids if not 0 <= i < 2**32)
            raise JaxquantError(f"token id {bad}: ids lie in [0, {self.vocab_size})") from None

    def apply_chat_template(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> str:
        """The prompt text of a conversation, by the checkpoint's chat template.

        `messages` are `[{"role": "user", "content": "..."}, ...]`; a bare string is one message of
        the user. `add_generation_prompt` appends what makes the model answer. `extra` are the
        template's variables beyond these: `tools` and `documents` as lists of dicts, a template's
        own switches. Encode the text with `add_special_tokens=False`.

        Raises JaxquantError if there is no template, if it refuses the messages, or if it is
        broken, unsafe or endless.
        """
        template = self._chat_templates.get("default")
        if extra.get("tools") is not None:
            template = self._chat_templates.get("tool_use", template)
        if template is None:
            raise JaxquantError(
                f"{self._source}: no chat template; it may be a base model: pass plain text, "
                "or put the template in chat_template.jinja"
            )
        variables = self.special_tokens | extra
        return template.render(messages, add_generation_prompt=add_generation_prompt, **variables)

    def encode_chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> list[int]:
        """The token ids of a conversation: `apply_chat_template`, encoded."""
        text = self.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, **extra
        )
        return self.encode(text, add_special_tokens=False)

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)


class TextStream:
    """Turns token ids into text as they come.

    The pieces that `push` and `finish` return add up to `tokenizer.decode` of all ids, exactly.
    The work per token does not grow with the text. Text waits while a character is incomplete, and
    with byte fallback (Llama 2, Gemma) until a run of byte tokens has ended, since `decode` judges
    the run as a whole.
    """

    # Tokens wait until the text at their end is certain. Then they are decoded behind the last
    # token before them, since a decoder treats its first token in its own way (it drops a leading
    # space), and what is new is emitted.

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._backend = tokenizer.backend
        self._skip = {
            i
            for i, token in self._backend.get_added_tokens_decoder().items()
            if token.special and skip_special_tokens
        }
        self._byte_fallback = '"ByteFallback"' in _state(self._backend.decoder)
        self._context: list[int] = []
        self._context_text = ""
        self._waiting: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        """The text that is certain now that `ids` came; it may be empty."""
        return "".join(self._push(int(i)) for i in ids)

    def finish(self) -> str:
        """The rest of the text; incomplete characters become U+FFFD, as in `decode`."""
        return self._emit()

    def _push(self, token: int) -> str:
        name = self._backend.id_to_token(token) if token >= 0 else None
        if name is None or token in self._skip:
            return ""
        self._waiting.append(token)
        return self._emit() if self._is_certain(name) else ""

    def _is_certain(self, last: str) -> bool:
        # One wrong byte turns a whole run of byte tokens into U+FFFD, so a run has to end first.
        if self._byte_fallback and len(last) == 6 and last.startswith("<0x"):
            return False
        # A UTF-8 character has 4 bytes at most: if it is complete, 4 tokens hold it.
        return not self._decode(self._waiting[-4:]).endswith("\ufffd")

    def _emit(self) -> str:
        tokens = self._context + self._waiting
        new = self._decode(tokens)[len(self._context_text) :]
        size = 1
        while size < len(tokens) and not self._decode(tokens[-size:]):
            size *= 2  # a lone space may decode to "", and then shields nothing
        self._context, self._waiting = tokens[-size:], []
        self._context_text = self._decode(self._context)
        return new

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)


class StopStrings:
    """Cuts a stream of text at the first of some stop strings.

    The stop string that is complete first counts, however the text is cut into pieces; of several
    complete at the same character, the longest. It is not emitted, nor is what follows.
    """

    def __init__(self, stops: str | Sequence[str]):
        """Of the stop strings; raises JaxquantError for an empty one or one that is no string."""
        self._stops = (stops,) if isinstance(stops, str) else tuple(stops)
        for stop in self._stops:
            if not isinstance(stop, str) or not stop:
                raise JaxquantError(f"stop string: got {stop!r}; it is a string, not empty")
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """The text that no stop string can touch any more, and whether one was reached."""
        if self._stopped:
            return "", True
        text = self._held + text
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stops]
        found = [(end, start) for end, start in found if start >= 0]
        if found:
            self._held, self._stopped = "", True
            return text[: min(found)[1]], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        """The text that was held back as a possible stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a proper beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def _state(component: Any) -> str:
    """A tokenizer component as JSON text, "" for None."""
    return "" if component is None else component.__getstate__().decode()


def _read_backend(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; pass a checkpoint's folder")
    if not path.is_file():
        others = [name for name in _CONVERTIBLE if (folder / name).is_file()]
        if not others:
            raise CheckpointError(f"{path}: no such file; copy it from the model's checkpoint")
        raise CheckpointError(
            f"{path}: no such file, only {others[0]}; convert it once with transformers: "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers package raises nothing narrower
        raise CheckpointError(f"{path}: not a tokenizer: {error}; fetch the file again") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file, {} if there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}; fetch the file again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: got a {type(content).__name__}; it holds a JSON object")
    return content


def _add_special_tokens(
    backend: tokenizers.Tokenizer, config: dict[str, Any], folder: Path
) -> dict[str, str]:
    """The special tokens by name; tokens that tokenizer.json lacks are added to `backend`."""
    path, older_path = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    listed = config.get("added_tokens_decoder")
    # How transformers tells a checkpoint that still needs the older file.
    older = _read_json(older_path) if listed is None else {}
    places = dict.fromkeys(config, path) | dict.fromkeys(older, older_path)
    config = config | older
    listed = {} if listed is None else listed
    if not isinstance(listed, dict) or not all(key.isdecimal() for key in listed):
        raise CheckpointError(
            f"{path}: 'added_tokens_decoder': got {str(listed)[:80]}; it maps token ids to tokens"
        )
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra_place = f"{places.get('extra_special_tokens', path)}: 'extra_special_tokens'"
    if not isinstance(extra, list | dict):
        raise CheckpointError(f"{extra_place}: got {extra!r}; it is a list or a dict of tokens")
    named = {
        name: value
        for name, value in config.items()
        if name in _NAMED
        or (name.endswith("_token") and (isinstance(value, str) or _has_content(value)))
    }
    if isinstance(extra, dict):
        named |= extra
        extra = []

    # By their flags too: those of the config go before those of tokenizer.json.
    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    tokens = [
        _added_token(listed[key], f"{path}: 'added_tokens_decoder'[{key!r}]")
        for key in sorted(listed, key=int)
    ]
    backend.add_tokens([token for token in tokens if repr(token) not in known])

    special = {
        name: _added_token(value, f"{places.get(name, path)}: {name!r}", special=True)
        for name, value in named.items()
        if value is not None
    }
    others = [_added_token(value, extra_place, special=True) for value in extra]
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_tokens([t for t in (*special.values(), *others) if t.content not in known])
    return {name: token.content for name, token in special.items()}


def _added_token(value: Any, where: str, **flags: bool) -> AddedToken:
    """A token as the configs write it, its text or a dict with its text and flags."""
    fields = {"content": value} if isinstance(value, str) else value
    if not _has_content(fields):
        raise CheckpointError(f"{where}: got {value!r}; it is a string or a dict with 'content'")
    known: dict[str, Any] = {key: fields[key] for key in _TOKEN_FIELDS if key in fields}
    known.update(flags)
    try:
        return AddedToken(**known)
    except TypeError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _has_content(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("content"), str)


def _read_chat_templates(config: dict[str, Any], folder: Path) -> dict[str, ChatTemplate]:
    """The templates by name, each from the place that goes first; see `Tokenizer.from_folder`."""
    found: dict[str, tuple[Any, Path]] = {}
    legacy = folder / "chat_template.json"
    found["default"] = (_read_json(legacy).get("chat_template"), legacy)
    path = folder / "tokenizer_config.json"
    template = config.get("chat_template")
    if isinstance(template, list):
        for i, entry in enumerate(template):
            if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
                raise CheckpointError(
                    f"{path}: 'chat_template'[{i}]: got {entry!r}; "
                    "an entry is a dict with 'name' and 'template'"
                )
            found[entry["name"]] = (entry.get("template"), path)
    elif template is not None:
        found["default"] = (template, path)
    for path in (folder / "additional_chat_templates").glob("*.jinja"):
        found[path.stem] = (_read_text(path), path)
    path = folder / "chat_template.jinja"
    if path.is_file():
        found["default"] = (_read_text(path), path)

    templates = {}
    for name, (text, path) in found.items():
        if isinstance(text, str):
            templates[name] = ChatTemplate(text, str(path))
        elif text is not None:
            raise CheckpointError(
                f"{path}: 'chat_template': got a {type(text).__name__}; it is a Jinja template"
            )
    return templates


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text: {error}") from error
