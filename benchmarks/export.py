"""Export time and peak resident memory of `jaxquant quantize`, and of `jaxquant verify` after it.

    python benchmarks/export.py DIR [DIR ...] [--synthetic GB] [--save]

Each runs in a process of its own, compilation included. `resident` is the highest resident size
(VmHWM) of the whole process, with everything that is imported. `raw write` writes and syncs as
many bytes as the export has, for comparison. The export goes beside DIR and is removed again.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from load import RESULTS, machine, memory, synthetic

SHARD_BYTES = 2 * 10**9


def measure(what: str, source: str, directory: str) -> dict:
    """Exports or verifies once, in this process."""
    import jaxquant as jq
    from jaxquant.checkpoint.verify import verify

    start, cpu = time.perf_counter(), time.process_time()
    if what == "quantize":
        jq.quantize_checkpoint(source, directory, max_shard_bytes=SHARD_BYTES)
    else:
        verify(source, directory)
    return {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "resident": memory("VmHWM"),
    }


def raw_write(path: Path, nbytes: int) -> dict:
    """Writes random bytes and waits for the disk."""
    block = os.urandom(2**26)
    start, cpu = time.perf_counter(), time.process_time()
    with path.open("wb", buffering=0) as file:
        for _ in range(nbytes // len(block)):
            file.write(block)
            os.fdatasync(file.fileno())
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    path.unlink()
    return {"seconds": seconds, "cpu": cpu, "resident": memory("VmHWM")}


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def rows(source: Path) -> list[str]:
    """The rows of one checkpoint."""
    with tempfile.TemporaryDirectory(dir=source.parent) as scratch:
        directory = Path(scratch) / "fp8"
        before, lines = size(source), []
        for what in ("quantize", "verify", "raw write"):
            if what == "raw write":
                nbytes = size(directory)
                shutil.rmtree(directory)
                out = raw_write(Path(scratch) / "raw", nbytes)
            else:
                nbytes = before
                command = [sys.executable, __file__, "--measure", what, source, directory]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
                out = json.loads(done.stdout)
            lines.append(
                f"| {source.name} ({before / 1e9:.1f} GB) | {what} | {out['seconds']:.1f} "
                f"| {nbytes / out['seconds'] / 1e9:.2f} | {out['cpu'] / nbytes * 1e9:.2f} "
                f"| {out['resident'] / 1e6:.0f} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", type=Path, metavar="DIR")
    parser.add_argument("--synthetic", type=float, metavar="GB")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/export.md")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    lines = [
        machine(),
        "",
        "| checkpoint | what | seconds | GB/s | CPU s/GB | resident MB |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        if args.synthetic:
            args.paths.append(synthetic(Path(scratch), args.synthetic))
        for path in args.paths:
            lines += rows(path.resolve())
    print("\n".join(lines))
    if args.save:
        (RESULTS / "export.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
