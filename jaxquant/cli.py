"""The command line: `jaxquant demo | quantize | verify | inspect | generate | eval | bench`."""

import argparse
import dataclasses
import json
import operator
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxquant.config import QuantConfig
from jaxquant.errors import JaxquantError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
      The exit status: 0 for success, 1 for an error (one line on stderr), 2 for wrong usage, 130
      if it was interrupted.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "run"):
        parser.print_help(sys.stderr)
        return 2
    try:
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("jaxquant: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `jaxquant inspect DIR | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 0
    except (JaxquantError, OSError) as error:
        if args.debug:
            raise
        text = str(error)
        if isinstance(error, OSError) and error.filename:
            text = f"{error.filename}: {error.strerror}"
        print("jaxquant: error:", *text.splitlines(), file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    import jaxquant

    parser = argparse.ArgumentParser(
        prog="jaxquant", description="Blocked FP8 for JAX: quantize, compare and run LLMs."
    )
    parser.add_argument("--version", action="version", version=f"jaxquant {jaxquant.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, run: Any, about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        sub.add_argument("--debug", action="store_true", help="show tracebacks of errors")
        sub.set_defaults(run=run)
        return sub

    demo = command("demo", _demo, "load a real chat model, quantize it, compare it, talk to it")
    demo.add_argument(
        "--model", help="a checkpoint folder or hub id (default: SmolLM2-135M-Instruct from PyPI)"
    )
    demo.add_argument("--prompt", default="Hi, pls intro yourself", help="what to ask the model")
    demo.add_argument(
        "--output", type=Path, default=Path("demo-output"), help="where the chart goes"
    )

    quantize = command("quantize", _quantize, "write a BF16 checkpoint as blocked FP8")
    quantize.add_argument("source", metavar="SRC", help="a checkpoint folder or hub id")
    quantize.add_argument("directory", metavar="DST", type=Path, help="the folder to write")
    _add_config(quantize)
    quantize.add_argument("--layout", choices=("fp8", "compressed-tensors"), default="fp8",
                          help="of names and config.json")  # fmt: skip
    quantize.add_argument("--max-shard-size", type=_size, default=5 * 1024**3, metavar="SIZE",
                          help="of a file: 2GB, 500MB (default 5GiB)")  # fmt: skip
    quantize.add_argument("--overwrite", action="store_true", help="replace a checkpoint at DST")
    quantize.add_argument(
        "--resume",
        action="store_true",
        help="go on after a run that was stopped; if this one fails, keep what it finished",
    )
    _add_json(quantize)

    verify = command("verify", _verify, "check a checkpoint that quantize wrote, byte by byte")
    verify.add_argument("source", metavar="SRC", help="the BF16 checkpoint: a folder or hub id")
    verify.add_argument("directory", metavar="DST", type=Path, help="what was written")
    _add_json(verify)

    inspect = command("inspect", _inspect, "show what a checkpoint holds, from its headers alone")
    inspect.add_argument("source", metavar="DIR", help="a checkpoint folder or hub id")
    _add_json(inspect)

    generate = command("generate", _generate, "continue a prompt, streamed")
    generate.add_argument("source", metavar="DIR", help="a checkpoint folder or hub id")
    generate.add_argument("prompt", metavar="PROMPT")
    _add_load(generate)
    generate.add_argument("--plain", action="store_true", help="no chat template")
    generate.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    generate.add_argument("--top-k", type=int, default=0, metavar="K")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P")
    generate.add_argument("--min-p", type=float, default=0.0, metavar="P")
    generate.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--cache-dtype", choices=("float8_e4m3fn",),
                          help="of keys and values (default: that of --dtype)")  # fmt: skip
    _add_attention(generate, "has the prompt attend in FP8")
    generate.add_argument("--stop", action="append", default=[], help="may be given repeatedly")
    _add_json(generate)

    evaluate = command("eval", _eval, "perplexity of FP8 and its KL divergence from BF16")
    evaluate.add_argument("source", metavar="DIR", help="a checkpoint folder or hub id")
    evaluate.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text (Alice)")
    evaluate.add_argument("--window", type=int, default=1024, help="tokens read at once (1024)")
    evaluate.add_argument("--windows", type=int, help="how many (default: all of the text)")
    evaluate.add_argument(
        "--against", metavar="DIR", help="the BF16 checkpoint, if DIR is FP8 already"
    )
    _add_attention(evaluate, "score FP8 once more, attending in FP8 too")
    _add_config(evaluate)
    _add_dtype(evaluate)
    _add_json(evaluate)

    bench = command("bench", _bench, "time loading, prefill and decode in BF16 and FP8")
    bench.add_argument("source", metavar="DIR", help="a checkpoint folder or hub id")
    bench.add_argument("--batch", type=int, default=1)
    bench.add_argument("--prompt-tokens", type=int, default=128, metavar="N")
    bench.add_argument("--new-tokens", type=int, default=64, metavar="N")
    bench.add_argument("--tune", action="store_true",
                       help="first measure the kernels of this model's products on this GPU, and "
                       "keep the fastest in your table of configs")  # fmt: skip
    bench.add_argument("--cache-dtype", choices=("float8_e4m3fn",),
                       help="time FP8 once more, with keys and values in FP8 too")  # fmt: skip
    _add_attention(bench, "time FP8 once more, with prompts that attend in FP8 too")
    _add_config(bench)
    _add_json(bench)
    return parser


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for a script")


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--block-size", type=_block_size, default=(128, 128), metavar="N",
                        help="128 (default), or out x in: 64x128")  # fmt: skip
    parser.add_argument("--fmt", choices=("e4m3", "e5m2"), default="e4m3")
    parser.add_argument("--scale-fmt", choices=("ue8m0",), help="scales as powers of two")
    parser.add_argument("--weight-only", action="store_true", help="leave activations in BF16")
    parser.add_argument("--keep", action="append", default=[], metavar="MODULE",
                        help="a module path that stays as it is; may be repeated")  # fmt: skip
    parser.add_argument("--head", action="store_true", help="quantize the output head too")


def _add_attention(parser: argparse.ArgumentParser, about: str) -> None:
    parser.add_argument("--attention-dtype", choices=("float8_e4m3fn",), help=about)


def _add_load(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fp8", action="store_true", help="quantize while loading")
    _add_config(parser)
    _add_dtype(parser)


def _block_size(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d+(x\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: one size, or out x in, as in 64x128")
    sizes = [int(size) for size in text.split("x")]
    return sizes[0], sizes[-1]


def _size(text: str) -> int:
    units = {"": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3,
             "KIB": 1024, "MIB": 1024**2, "GIB": 1024**3}  # fmt: skip
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|[KMG]I?B)", text.upper())
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a size, as in 2GB or 500MB")
    return int(float(match[1]) * units[match[2]])


def _config(args: argparse.Namespace) -> QuantConfig:
    return QuantConfig(
        fmt=args.fmt,
        activation_scheme=None if args.weight_only else "dynamic",
        weight_block_size=args.block_size,
        scale_fmt=args.scale_fmt,
        modules_to_not_convert=tuple(args.keep),
        quantize_head=args.head,
    )


def _asked_config(args: argparse.Namespace) -> QuantConfig | None:
    """The config if its options say anything, else None: a checkpoint that is FP8 stays so."""
    config = _config(args)
    return None if config == QuantConfig() else config


def _show(result: Any, args: argparse.Namespace) -> None:
    if args.json:
        _print_json(result.to_dict())
    else:
        print(result)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _demo(args: argparse.Namespace) -> None:
    from jaxquant.demo import run

    run.demo(args.model, args.prompt, args.output)


def _quantize(args: argparse.Namespace) -> None:
    from jaxquant.checkpoint.export import quantize_checkpoint
    from jaxquant.checkpoint.hub import resolve

    report = quantize_checkpoint(
        resolve(args.source),
        args.directory,
        _config(args),
        max_shard_bytes=args.max_shard_size,
        overwrite=args.overwrite,
        resume=args.resume,
        layout=args.layout,
    )
    _show(report, args)
    if not args.json:
        print(f"written to {args.directory}")
        ragged = [t for t in report.quantized if any(map(operator.mod, t.shape, args.block_size))]
        if ragged:
            print(
                f"note: {len(ragged)} weights do not divide into whole blocks, which transformers "
                "asks for; with a smaller --block-size they may"
            )


def _verify(args: argparse.Namespace) -> None:
    from jaxquant.checkpoint.hub import resolve
    from jaxquant.checkpoint.verify import verify

    report = verify(resolve(args.source), args.directory)
    _show(report, args)
    if not args.json:
        print(f"{args.directory} holds what follows from {args.source}, to the byte")


def _inspect(args: argparse.Namespace) -> None:
    from jaxquant.checkpoint import inspect

    result = inspect.inspect(args.source)
    _show(result, args)


def _generate(args: argparse.Namespace) -> None:
    from jaxquant.pipelines import pipeline

    if not args.fp8 and _asked_config(args):
        raise JaxquantError(
            "options of the quantization came without --fp8; add --fp8, or leave them out"
        )
    pipe = pipeline(
        args.source,
        _config(args) if args.fp8 else None,
        chat=False if args.plain else None,
        dtype=args.dtype,
    )
    options = {
        name: getattr(args, name)
        for name in (
            "max_new_tokens",
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "seed",
            "stop",
            "cache_dtype",
            "attention_dtype",
        )
    }
    if args.json:
        _print_json(dataclasses.asdict(pipe(args.prompt, **options)))
        return
    for piece in pipe.stream(args.prompt, **options):
        print(piece, end="", flush=True)
    print()


def _eval(args: argparse.Namespace) -> None:
    from jaxquant.comparison import compare
    from jaxquant.data import alice

    try:
        text = alice() if args.text is None else args.text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise JaxquantError(f"{args.text}: not UTF-8 text: {error}") from None
    result = compare(
        args.source,
        text,
        _asked_config(args),
        against=args.against,
        dtype=args.dtype,
        window=args.window,
        count=args.windows,
        attention_dtype=args.attention_dtype,
    )
    _show(result, args)


def _bench(args: argparse.Namespace) -> None:
    from jaxquant.bench import bench

    result = bench(
        args.source,
        _asked_config(args),
        batch=args.batch,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        tune=args.tune,
        cache_dtype=args.cache_dtype,
        attention_dtype=args.attention_dtype,
    )
    _show(result, args)
