"""Write `smollm2_tokens.json`: texts and the token ids SmolLM2's tokenizer gives them.

    python tests/golden/make_smollm2_tokens.py SmolLM2-135M-Instruct.Q4_1.gguf

The ids come from transformers' own conversion of the GGUF file (needs transformers and gguf),
with one repair: that conversion forgets SmolLM2's splitting of digits one by one before the
byte-level regex (the `tokenizer.ggml.pre` "smollm"). The vocabulary has no token of two digits,
so it matters only for white space before a number, "a  1". Here every text is cut at its digits
first, and the pieces are converted one at a time, which is that splitting's definition.
"""

# ruff: noqa: RUF001 (the texts mean their odd letters)

import json
import sys
import unicodedata
from pathlib import Path

from transformers import AutoTokenizer

OUT = Path(__file__).parent / "smollm2_tokens.json"

TEXTS = [
    "",
    " ",
    "a",
    "Hello, world!",
    " leading space",
    "trailing space ",
    "The quick brown fox jumps over the lazy dog.",
    "I'm sure they've said we'll go; it's what he'd do, isn't it? DON'T YOU'RE",
    "Alice was beginning to get very tired of sitting by her sister on the bank",
    "“Curiouser and curiouser!” cried Alice — so much surprised…",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "snake_case camelCase SCREAMING_CASE kebab-case dotted.name a/b\\c",
    "def f(x: int) -> int:\n    return x ** 2  # squared\n\n\nclass A:\n\tpass\n",
    "for (int i = 0; i < 10; ++i) { sum += a[i] * 3.14f; }",
    '{"key": [1, 2.5e-10, null, true], "nested": {"a": "b\\n"}}',
    "<html><body class='x'>&amp;</body></html>",
    "SELECT * FROM t WHERE id >= 100 AND name LIKE '%x%';",
    "https://example.com/path?q=1&r=two#frag user@example.com",
    "0 1 12 123 1234 12345 3.14159 1,000,000 -7 +8 1e10 0xFF 50%",
    "2026-11-22T13:59:19Z v1.2.3 covid19 B2B 4th",
    "two  spaces  2 then   3 digits",
    "a  1\n\n2\t\t3 \n 4    5",
    "x = 1\n    y = 2\n        z = 3",
    "① Ⅳ ½ ² ３ ٣ ४ are numbers too:  ½",
    "a  b   c    d     e",
    "\n",
    "\n\n\n",
    "\t\ttabs\tand \t mixed \n lines\r\nwith CRLF\r\n",
    "   \n   \n\n  indented\n",
    "non breaking space, thin space, ideographic　space, zero\u200bwidth",
    "café naïve façade Ångström Straße œuvre",
    "decomposed: cafe\u0301 n\u0303",
    "Привет, как дела? Γειά σου Κόσμε",
    "你好,世界。今天天气很好!",
    "こんにちは世界 カタカナ 한국어 안녕하세요",
    "مرحبا بالعالم שלום עולם",
    "नमस्ते दुनिया สวัสดีชาวโลก",
    "😀 👍🏽 👨‍👩‍👧‍👦 🇫🇷 ❤️ 🏳️‍🌈",
    "∑ ∫ √2 ≈ 1.414, α + β ≤ γ, 10⁻³ µm, ∀x∈ℝ",
    "!!! ??? ... --- === *** ~~~ ### $$$ @@@ ^^^ |||",
    "\x00\x01\x1b[31mred\x7f",
    "\ufeffbom and � replacement",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n",
    "text<|endoftext|>more <|endoftext|> spaces  <|endoftext|>  7",
    "<repo_name>a/b<file_sep>x.py\n<filename>y<gh_stars>100-1000<issue_start>",
    "<jupyter_code>print(1)<jupyter_output>1<empty_output>",
    "<|im_start |> <|im_end| > <im_start> |im_end|",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
]


def pieces(text: str) -> list[str]:
    """The text cut into single digits (any Unicode number) and what lies between them."""
    out = [""]
    for character in text:
        if unicodedata.category(character).startswith("N"):
            out += [character, ""]
        else:
            out[-1] += character
    return [piece for piece in out if piece]


def main() -> None:
    path = Path(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    cases = []
    for text in TEXTS:
        ids = [id_ for piece in pieces(text) for id_ in encode(piece)]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text, text
        if ids != encode(text):
            print(f"the splitting of digits matters for {text!r}")
        cases.append({"text": text, "ids": ids})
    lines = ",\n".join(json.dumps(case) for case in cases)
    OUT.write_text(f"[\n{lines}\n]\n")
    print(f"{len(cases)} texts, {sum(len(case['ids']) for case in cases)} tokens -> {OUT.name}")


if __name__ == "__main__":
    main()
