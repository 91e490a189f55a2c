"""`verify`: an export against its source, byte by byte."""

import contextlib
from pathlib import Path

import numpy as np

from jaxquant.checkpoint import compressed
from jaxquant.checkpoint.export import QuantizedTensors
from jaxquant.checkpoint.folder import CheckpointFolder
from jaxquant.checkpoint.plan import make_plan
from jaxquant.checkpoint.progress import Progress
from jaxquant.checkpoint.shard_files import TensorSource
from jaxquant.checkpoint.stored import stored_quantization
from jaxquant.checkpoint.stream import skipped_reports
from jaxquant.errors import CheckpointError
from jaxquant.report import QuantReport


def verify(
    source: str | Path, directory: str | Path, *, progress: bool | None = None
) -> QuantReport:
    """Makes every tensor of an export again from its source, and compares all bytes.

    Args:
      source: the folder that was exported.
      directory: the export; its config.json says how it was quantized.
      progress: whether to show a bar; None shows it on a terminal.

    Returns:
      The report of the export.

    Raises:
      CheckpointError: a tensor that is missing, too many, or of another dtype, shape or content
        than it should be: the first one, by name. Also files that cannot be read.
    """
    with CheckpointFolder(source) as folder, CheckpointFolder(directory) as exported:
        config = stored_quantization(exported.config, f"{exported.path}/config.json")
        if config is None:
            raise CheckpointError(f"{exported.path}: not FP8; allowed: what quantize wrote")
        plan = make_plan(folder, config)
        if plan.stored:
            raise CheckpointError(f"{folder.path}: FP8 already; give the checkpoint it came from")
        total = sum(folder.info(item.name).nbytes for item in plan.items)
        with (
            Progress(f"Verifying {exported.path.name}", total, progress) as bar,
            contextlib.closing(QuantizedTensors(folder, plan, bar, "compare")) as tensors,
        ):
            sources = tensors.sources()
            fields = exported.config.get("quantization_config", {})
            if fields.get("quant_method") == "compressed-tensors":
                sources = compressed.renamed(sources)
            names = {expected.name for expected in sources}
            for name in exported.names:
                if name not in names:
                    raise CheckpointError(
                        f"{exported.shard_of(name)}: tensor {name} follows from nothing in "
                        f"{folder.path}"
                    )
            for expected in sources:
                _compare(exported, expected)
            entries = (*tensors.entries, *skipped_reports(folder, plan))
            return QuantReport(entries, bar.timing())


def _compare(exported: CheckpointFolder, expected: TensorSource) -> None:
    info = exported.info(expected.name)
    where = f"{exported.shard_of(expected.name)}: tensor {expected.name}"
    if (info.dtype, info.shape) != (expected.dtype, expected.shape):
        raise CheckpointError(
            f"{where} is {info.dtype} {list(info.shape)}; its source asks for "
            f"{expected.dtype} {list(expected.shape)}"
        )
    row = 0
    for piece in expected.pieces():
        rows = slice(row, row + len(piece) if piece.ndim else 1)
        found = exported.read_rows(expected.name, rows)
        if not np.array_equal(_bytes(found), _bytes(piece)):
            raise CheckpointError(
                f"{where} has other values than follow from its source, in rows {rows.start} to "
                f"{rows.stop - 1}; export it again"
            )
        row = rows.stop


def _bytes(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)
