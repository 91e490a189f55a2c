"""Load time and peak host memory of a checkpoint, in BF16 and with FP8 on the way.

    python benchmarks/load.py DIR [DIR ...] [--synthetic GB] [--save]

Each load runs in a process of its own, with the files in the page cache, compilation included;
`again` is a second load in that process, with all compiled.
`CPU s/GB` is processor time, which other programs on the machine change less than `seconds`.
Memory is counted above what the process had after importing jaxquant and starting JAX: `peak` is
the highest resident size (VmHWM, mapped files included), `anonymous` the highest RssAnon seen by a
thread that looks every 2 ms, `device` the most that was allocated on a GPU. The bound for FP8 is:
FP8 model + largest layer in BF16 + 300 MB on a CPU, FP8 model + 1 GiB of a GPU's memory.
Where transformers and torch are installed, they load the same files beside; to a CPU they map the
files, and read them when they are used.
Synthetic checkpoints of 8 GB and more have the matrices of an 8B Llama; TMPDIR says where they go.
"""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PEAKS = ("peak", "anonymous", "device")


def memory(field: str) -> float:
    """A field of /proc/self/status in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+)", status)[1]) * 1024


def measure(path: str, mode: str) -> dict:
    """Loads twice, in this process."""
    import jax
    import jax.numpy as jnp

    import jaxquant as jq

    jq.from_pretrained  # noqa: B018  imports what loading needs
    jnp.zeros(1).block_until_ready()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    base, base_anonymous, peak_anonymous = memory("VmRSS"), memory("RssAnon"), [0.0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak_anonymous[0] = max(peak_anonymous[0], memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    config = jq.QuantConfig() if mode == "fp8" else None

    def load() -> float:
        start = time.perf_counter()
        model = jq.from_pretrained(path, config)
        jax.block_until_ready(model.module)
        seconds = time.perf_counter() - start
        print(mode, f"{seconds:.2f} s:", model.report.timing, file=sys.stderr)
        return seconds

    cpu = time.process_time()
    seconds = load()
    cpu = time.process_time() - cpu
    peak, peak_of_first = memory("VmHWM") - base, peak_anonymous[0]
    again = load()
    done.set()
    watcher.join()
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "seconds": seconds,
        "again": again,
        "cpu": cpu,
        "peak": peak,
        "anonymous": peak_of_first - base_anonymous,
        "device": stats.get("peak_bytes_in_use"),
    }


def measure_transformers(path: str, mode: str) -> dict:
    """Loads twice, in this process, with torch; to a GPU if there is one."""
    import torch  # pyright: ignore
    import transformers  # pyright: ignore

    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"dtype": torch.bfloat16, "device_map": device}
    if mode == "fp8":
        options["quantization_config"] = transformers.FineGrainedFP8Config()
    torch.zeros(1, device=device)

    def load() -> float:
        start = time.perf_counter()
        transformers.AutoModelForCausalLM.from_pretrained(path, **options)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    cpu = time.process_time()
    seconds = load()
    return {"seconds": seconds, "cpu": time.process_time() - cpu, "again": load()}


def synthetic(directory: Path, gigabytes: float) -> Path:
    """A BF16 Llama checkpoint of about that size: one random block, repeated."""
    import ml_dtypes
    import numpy as np

    from jaxquant.checkpoint.writer import TensorSource, write_folder
    from jaxquant.models.hf_config import HFConfig
    from jaxquant.models.registry import Family

    hidden, mlp, vocab = (4096, 14336, 128256) if gigabytes >= 8 else (2048, 8192, 32768)
    kv_heads = hidden // 512
    per_layer = 2 * (2 * hidden * hidden + 2 * hidden * kv_heads * 128 + 3 * hidden * mlp)
    layers = max(1, round((gigabytes * 1e9 - 2 * hidden * vocab) / per_layer))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "vocab_size": vocab,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    block = np.random.default_rng(0).normal(0, 0.02, mlp * hidden + 97).astype(ml_dtypes.bfloat16)
    sources = [
        TensorSource(name, block.dtype, slot.shape, lambda s=slot.shape: np.resize(block, s))
        for name, slot in Family(HFConfig(config)).slots().items()
    ]
    return write_folder(directory / f"synthetic-{gigabytes:g}GB", sources, config=config)


def cache(path: str) -> int:
    """Reads the files, so that they are in the page cache; their size in bytes."""
    size = 0
    for file in Path(path).glob("*.safetensors"):
        with file.open("rb", buffering=0) as stream:
            while count := len(stream.read(2**24)):
                size += count
    return size


def machine() -> str:
    """The first line of a table: date, machine, versions."""
    import jax

    device = jax.devices()[0]
    kind = f"{os.cpu_count()}-core {platform.machine()}"
    return (
        f"{datetime.date.today()}, {kind if device.platform == 'cpu' else device.device_kind}, "
        f"jax {jax.__version__}, Python {platform.python_version()}"
    )


def bound(path: str) -> tuple[float, float]:
    """Bytes of the FP8 model, and the bound on what loading it may take."""
    import jaxquant as jq
    from jaxquant.checkpoint.folder import CheckpointFolder
    from jaxquant.checkpoint.plan import make_plan

    with CheckpointFolder(path) as folder:
        plan = make_plan(folder, jq.QuantConfig())
        sizes: dict = {}
        fp8 = 0
        for item in plan.items:
            nbytes = folder.info(item.name).nbytes
            key = item.slot.layer if item.slot.layer is not None else item.name
            sizes[key] = sizes.get(key, 0) + nbytes
            fp8 += nbytes // 2 if item.config else nbytes
    return fp8, fp8 + max(sizes.values()) + 300e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", metavar="DIR")
    parser.add_argument("--synthetic", type=float, metavar="GB")
    parser.add_argument(
        "--save", nargs="?", const="load", metavar="NAME", help="write benchmarks/results/NAME.md"
    )
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        path, library, mode = args.measure
        run = measure if library == "jaxquant" else measure_transformers
        print(json.dumps(run(path, mode)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        paths = [*args.paths]
        if args.synthetic:
            paths.append(str(synthetic(Path(scratch), args.synthetic)))
        lines = table(paths)
    print("\n".join(lines))
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{args.save}.md").write_text("\n".join(lines) + "\n")


def programs() -> list[tuple[str, str]]:
    """Libraries and modes to measure."""
    import jax

    ours = [("jaxquant", "bf16"), ("jaxquant", "fp8")]
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return ours
    theirs = [("transformers", "bf16"), ("transformers", "fp8")]  # which needs a GPU
    return ours + theirs[: 1 if jax.devices()[0].platform == "cpu" else 2]


def table(paths: list[str]) -> list[str]:
    lines = [
        machine(),
        "",
        "| checkpoint | mode | seconds | BF16 GB/s | again | BF16 GB/s | CPU s/GB | peak MB "
        "| anonymous MB | device MB | FP8 model MB | bound MB |",
        "|---" * 12 + "|",
    ]
    for path in paths:
        fp8, limit = bound(path)
        for library, mode in programs():
            size = cache(path)
            command = [sys.executable, __file__, "--measure", path, library, mode]
            run = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            out = json.loads(run.stdout)
            rates = (f"{out[k]:.2f} | {size / out[k] / 1e9:.2f}" for k in ("seconds", "again"))
            device = out.get("device")
            bounds = f"{fp8 / 1e6:.0f} | {(fp8 + 2**30 if device else limit) / 1e6:.0f}"
            memory = [f"{out[k] / 1e6:.0f}" if out.get(k) else "" for k in PEAKS]
            name = mode if library == "jaxquant" else f"{library} {mode}"
            lines.append(
                f"| {Path(path).name} ({size / 1e6:.0f} MB) | {name} | {' | '.join(rates)} "
                f"| {out['cpu'] / size * 1e9:.2f} | {' | '.join(memory)} "
                f"| {bounds if name == 'fp8' else ' | '} |"
            )
    return lines


if __name__ == "__main__":
    main()
