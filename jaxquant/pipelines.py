"""`pipeline`: prompts in, text out."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxquant import generation
from jaxquant.checkpoint.hub import resolve
from jaxquant.config import QuantConfig
from jaxquant.errors import JaxquantError
from jaxquant.generation import Sampling
from jaxquant.language_model import LanguageModel, from_pretrained
from jaxquant.text import StopStrings, TextStream, Tokenizer

Conversation = str | Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Response:
    """What came of one prompt.

    Attributes:
      text: the new text, without special tokens and without what stopped it.
      finish_reason: "stop" (a stop token or string) or "length".
      token_ids: the new tokens, a stop token included.
      input_token_len: tokens of the prompt, the chat template's included.
    """

    text: str
    finish_reason: str
    token_ids: list[int] = dataclasses.field(repr=False)
    input_token_len: int

    @property
    def generate_token_len(self) -> int:
        """How many tokens are new."""
        return len(self.token_ids)


class Pipeline:
    """A model with its tokenizer; see `pipeline`.

    Attributes:
      model: the LanguageModel.
      tokenizer: its Tokenizer.
      chat: whether prompts go through the chat template.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, *, chat: bool | None = None):
        if chat and not tokenizer.has_chat_template:
            raise JaxquantError(f"{model.path}: chat=True, but the checkpoint has no chat template")
        self.model = model
        self.tokenizer = tokenizer
        self.chat = tokenizer.has_chat_template if chat is None else chat

    def __call__(self, prompts: Conversation | Sequence[Conversation], **options: Any) -> Any:
        """Answers one prompt or a batch.

        Args:
          prompts: a string, a conversation (`[{"role": "user", "content": "..."}, ...]`), or a
            sequence of strings and conversations.
          **options: `max_new_tokens` (256), `stop` (strings that end the text), `stop_tokens`
            (ids; default the checkpoint's), `cache_dtype` ("float8_e4m3fn" keeps keys and values in
            FP8; default the model's dtype), `attention_dtype` (likewise, of prompts' attention),
            and what `jaxquant.generation.Sampling` takes: `temperature` (0, the default, is
            greedy), `top_k`, `top_p`, `min_p`, `repetition_penalty`, `seed`.

        Returns:
          A Response for a string or a conversation, else a list of them.

        Raises:
          JaxquantError: a prompt that is empty or longer than the context; a bad option, by name.
        """
        if not isinstance(prompts, Sequence):
            raise JaxquantError(
                f"prompts: got {type(prompts).__name__}; pass a string, a conversation, or a list"
            )
        one = isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], Mapping))
        batch: Any = [prompts] if one else prompts
        run = _Run(self, batch, generation.LONGEST_CHUNK, **options)
        for _ in run:
            pass
        return run.responses()[0] if one else run.responses()

    def stream(self, prompt: Conversation, **options: Any) -> Iterator[str]:
        """The answer to one prompt, in pieces as they come; options as in a call."""
        for pieces in _Run(self, [prompt], generation.STREAM_CHUNK, **options):
            if pieces[0]:
                yield pieces[0]

    def encode(self, prompt: Conversation) -> list[int]:
        """The token ids of a prompt, through the chat template if `chat`."""
        if self.chat:
            return self.tokenizer.encode_chat(prompt)
        if not isinstance(prompt, str):
            raise JaxquantError("a conversation came, but this pipeline takes plain text (no chat)")
        return self.tokenizer.encode(prompt)


class _Run:
    """One call: iterating gives the new pieces of text of each prompt."""

    def __init__(
        self,
        pipe: Pipeline,
        prompts: Sequence[Conversation],
        chunk: int,
        *,
        max_new_tokens: int = 256,
        stop: str | Sequence[str] = (),
        stop_tokens: Sequence[int] | None = None,
        cache_dtype: str | None = None,
        attention_dtype: str | None = None,
        **sampling: Any,
    ):
        model, tokenizer = pipe.model, pipe.tokenizer
        if stop_tokens is None:
            stop_tokens = model.stop_tokens or [
                i for i in [tokenizer.eos_token_id] if i is not None
            ]
        self.stop_tokens = frozenset(stop_tokens)
        self.inputs = [pipe.encode(prompt) for prompt in prompts]
        self.streams = [TextStream(tokenizer) for _ in prompts]
        self.stops = [StopStrings(stop) for _ in prompts]
        self.texts = ["" for _ in prompts]
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.reasons: list[str | None] = [None for _ in prompts]
        self.chunks = generation.stream(
            model.module,
            self.inputs,
            Sampling(**_known(sampling)),
            max_new_tokens=max_new_tokens,
            stop_tokens=sorted(self.stop_tokens),
            chunk=chunk,
            cache_dtype=cache_dtype,
            attention_dtype=attention_dtype,
        )

    def __iter__(self) -> Iterator[list[str]]:
        for chunk in self.chunks:
            yield [self._push(row, tokens) for row, tokens in enumerate(chunk)]
            if all(self.reasons):
                break
        yield [self._finish(row) for row in range(len(self.texts))]

    def _push(self, row: int, tokens: list[int]) -> str:
        piece = ""
        for token in tokens:
            if self.reasons[row]:
                break
            self.tokens[row].append(token)
            if token in self.stop_tokens:
                self.reasons[row] = "stop"
                break
            text, stopped = self.stops[row].push(self.streams[row].push([token]))
            piece += text
            if stopped:
                self.reasons[row] = "stop"
        self.texts[row] += piece
        return piece

    def _finish(self, row: int) -> str:
        text, stopped = self.stops[row].push(self.streams[row].finish())
        text += self.stops[row].finish()
        self.reasons[row] = self.reasons[row] or ("stop" if stopped else "length")
        self.texts[row] += text
        return text

    def responses(self) -> list[Response]:
        return [
            Response(text, reason or "length", tokens, len(prompt))
            for text, reason, tokens, prompt in zip(
                self.texts, self.reasons, self.tokens, self.inputs, strict=True
            )
        ]


def pipeline(
    model: str | os.PathLike | LanguageModel,
    quant_config: QuantConfig | Mapping[str, Any] | None = None,
    *,
    chat: bool | None = None,
    **load_options: Any,
) -> Pipeline:
    """Loads a checkpoint and its tokenizer.

    Args:
      model: a folder or hub id as in `from_pretrained`, or a model that is loaded already.
      quant_config: as in `from_pretrained`.
      chat: whether prompts go through the checkpoint's chat template; default: if it has one.
      **load_options: of `from_pretrained`: `dtype`, `progress`.

    Raises:
      CheckpointError: no tokenizer, or a checkpoint that cannot be loaded as asked.
    """
    if isinstance(model, LanguageModel):
        if quant_config is not None or load_options:
            raise JaxquantError("the model is loaded already; quant_config and load options came")
        return Pipeline(model, Tokenizer.from_folder(model.path), chat=chat)
    path = resolve(model)
    tokenizer = Tokenizer.from_folder(path)  # first: it fails sooner
    return Pipeline(from_pretrained(path, quant_config, **load_options), tokenizer, chat=chat)


def _known(sampling: dict[str, Any]) -> dict[str, Any]:
    allowed = [field.name for field in dataclasses.fields(Sampling)]
    for name in sampling:
        if name not in allowed:
            dtypes = "cache_dtype", "attention_dtype"
            known = ", ".join(["max_new_tokens", "stop", "stop_tokens", *dtypes, *allowed])
            raise JaxquantError(f"no such option: {name}; allowed: {known}")
    return sampling
