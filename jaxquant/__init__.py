"""Blocked FP8 for JAX: quantize BF16 checkpoints while loading them, run them compiled by XLA."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxquant.array import QuantizedArray as QuantizedArray
from jaxquant.blocked import (
    check_finite as check_finite,
    dequantize as dequantize,
    quantize as quantize,
    quantize_activations as quantize_activations,
)
from jaxquant.config import QuantConfig as QuantConfig
from jaxquant.errors import CheckpointError as CheckpointError, JaxquantError as JaxquantError
from jaxquant.matmul import matmul as matmul
from jaxquant.report import QuantReport as QuantReport
from jaxquant.tree import Rule as Rule, quantize_tree as quantize_tree

if TYPE_CHECKING:
    from jaxquant.checkpoint.export import quantize_checkpoint as quantize_checkpoint
    from jaxquant.evaluation import evaluate as evaluate
    from jaxquant.language_model import (
        LanguageModel as LanguageModel,
        from_pretrained as from_pretrained,
        save_pretrained as save_pretrained,
    )
    from jaxquant.pipelines import pipeline as pipeline
    from jaxquant.transform import (
        Fp8Report as Fp8Report,
        fp8 as fp8,
        fp8_report as fp8_report,
    )

__version__ = "0.1.0"

# Models need flax.nnx and tokenizers, whose import takes longer than all of the rest.
_LAZY = {
    "Fp8Report": "jaxquant.transform",
    "LanguageModel": "jaxquant.language_model",
    "evaluate": "jaxquant.evaluation",
    "fp8": "jaxquant.transform",
    "fp8_report": "jaxquant.transform",
    "from_pretrained": "jaxquant.language_model",
    "pipeline": "jaxquant.pipelines",
    "quantize_checkpoint": "jaxquant.checkpoint.export",
    "save_pretrained": "jaxquant.language_model",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'jaxquant' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
