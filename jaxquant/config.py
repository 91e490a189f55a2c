"""QuantConfig: what Hugging Face's `quantization_config` says of a blocked FP8 checkpoint."""

import dataclasses
import difflib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from jaxquant.errors import JaxquantError

FMT_DTYPES = {
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "e5m2": np.dtype(ml_dtypes.float8_e5m2),
}

# Keys that other writers put beside ours. They say nothing about the weights' bytes, so they are
# accepted and kept. `ignored_layers` (vLLM) is another name for `modules_to_not_convert`.
_FOREIGN_KEYS = frozenset(
    {
        "dequantize",
        "expert_dtype",
        "ignored_layers",
        "kv_cache_scheme",
        "modules_to_convert",
        "packed_modules_mapping",
        "quantization_status",
        "quantized_by",
        "use_deep_gemm",
        "version",
    }
)


class ConfigError(JaxquantError):
    """A field of a quantization config that is not allowed."""

    def __init__(self, field: str, came: object, allowed: str):
        self.field = field
        super().__init__(f"quantization config: {field} is {came!r}; allowed: {allowed}")


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """How weights are quantized: blocked FP8, one float32 scale per block.

    Hashable, so it can be a static argument of a jitted function.

    Attributes:
      quant_method: "fp8", the only one.
      fmt: "e4m3" (`float8_e4m3fn`, largest value 448) or "e5m2" (`float8_e5m2`, 57344).
      activation_scheme: "dynamic" quantizes activations per token and 128 columns at run time
        (W8A8); None leaves them as they are (weight-only, W8A16).
      weight_block_size: (out, in) extents of a block of a K-major weight `[..., out, in]`; an int
        means a square block.
      scale_fmt: None for float32 scales, "ue8m0" for scales rounded up to powers of two.
      modules_to_not_convert: module paths that stay as they are. An entry is a run of whole path
        components: "lm_head", "layers.0.mlp" and "mlp.gate" match, "gate" does not match
        "gate_proj".
      quantize_head: whether the output head becomes FP8 too, which by default it does not. Says
        what to do, not what was done: `to_dict` leaves it out.
      foreign: keys of other tools, kept for `to_dict` and ignored otherwise.

    Raises:
      ConfigError: names the field, what came and what is allowed.

    >>> QuantConfig(weight_block_size=128).weight_block_size
    (128, 128)
    """

    quant_method: str = "fp8"
    fmt: str = "e4m3"
    activation_scheme: str | None = "dynamic"
    weight_block_size: tuple[int, int] = (128, 128)
    scale_fmt: str | None = None
    modules_to_not_convert: tuple[str, ...] = ()
    quantize_head: bool = False
    foreign: Mapping[str, Any] = dataclasses.field(
        default_factory=dict, repr=False, compare=False, hash=False
    )

    def __post_init__(self):
        if self.quant_method != "fp8":
            raise ConfigError("quant_method", self.quant_method, '"fp8"')
        _check_choice("fmt", self.fmt, tuple(FMT_DTYPES))
        _check_choice("activation_scheme", self.activation_scheme, ("dynamic", None))
        _check_choice("scale_fmt", self.scale_fmt, ("ue8m0", None))
        object.__setattr__(self, "weight_block_size", _block_pair(self.weight_block_size))
        object.__setattr__(
            self,
            "modules_to_not_convert",
            _names("modules_to_not_convert", self.modules_to_not_convert),
        )

    @property
    def fmt_dtype(self) -> np.dtype:
        """The numpy dtype of the quantized values."""
        return FMT_DTYPES[self.fmt]

    def describe(self) -> str:
        """The fields that decide the weights' bytes, in one short line."""
        bo, bi = self.weight_block_size
        scales = self.scale_fmt or "float32"
        return f"{self.fmt}, blocks of {bo}x{bi}, {scales} scales"

    def same_bytes(self, other: "QuantConfig") -> bool:
        """Whether both configs give the same quantized bytes for the same weight."""
        return self.describe() == other.describe()

    def numerics(self) -> "QuantConfig":
        """This config without the names of modules: equal for all tensors quantized alike."""
        return dataclasses.replace(self, modules_to_not_convert=(), quantize_head=False, foreign={})

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "QuantConfig":
        """Reads Hugging Face's `quantization_config`.

        Args:
          config: the mapping; `quant_method` is required. `weight_block_size` may be null or
            missing only where the default applies.

        Raises:
          ConfigError: a missing `quant_method`, a bad value, or an unknown key (with the nearest
            known one).
        """
        if not isinstance(config, Mapping):
            raise ConfigError("quantization_config", config, "a JSON object")
        if "quant_method" not in config:
            raise ConfigError("quant_method", None, '"fp8" (the key is required)')
        if config["quant_method"] != "fp8":
            raise ConfigError("quant_method", config["quant_method"], '"fp8"')
        ours = ("quantize_head", "foreign")
        known = [f.name for f in dataclasses.fields(cls) if f.name not in ours]
        fields: dict[str, Any] = {}
        foreign: dict[str, Any] = {}
        for key, value in config.items():
            if key in known:
                fields[key] = value
            elif key in _FOREIGN_KEYS:
                foreign[key] = value
            else:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(known)}"
                raise ConfigError(str(key), value, f"no such key; {hint}")
        if fields.get("scale_fmt") == "float":  # what transformers writes for None
            fields["scale_fmt"] = None
        keep = _names("modules_to_not_convert", fields.get("modules_to_not_convert"))
        also = _names("ignored_layers", foreign.get("ignored_layers"))
        fields["modules_to_not_convert"] = tuple(dict.fromkeys(keep + also))
        return cls(**fields, foreign=foreign)

    def to_dict(self) -> dict[str, Any]:
        """Hugging Face's `quantization_config`; `from_dict` reads it back to an equal config.

        But for `quantize_head`: what became of the head is to be seen in the checkpoint.
        """
        return {
            **self.foreign,
            "quant_method": self.quant_method,
            "fmt": self.fmt,
            "activation_scheme": self.activation_scheme,
            "weight_block_size": list(self.weight_block_size),
            "scale_fmt": self.scale_fmt,
            "modules_to_not_convert": list(self.modules_to_not_convert),
        }


def keeps_module(config: QuantConfig, path: Sequence[str]) -> str | None:
    """An entry of `modules_to_not_convert` that a path of components matches, or None."""
    entries = _entries_of(config.modules_to_not_convert)
    return next(
        (
            same_length[run]
            for n, same_length in entries.items()
            for i in range(len(path) - n + 1)
            if (run := tuple(path[i : i + n])) in same_length
        ),
        None,
    )


@functools.lru_cache
def _entries_of(names: tuple[str, ...]) -> dict[int, dict[tuple[str, ...], str]]:
    """Entries by their number of components: models have thousands of paths, lists hundreds."""
    entries: dict[int, dict[tuple[str, ...], str]] = {}
    for name in names:
        parts = tuple(name.replace("/", ".").split("."))
        entries.setdefault(len(parts), {}).setdefault(parts, name)
    return entries


def _check_choice(field: str, value: object, allowed: tuple) -> None:
    # `in` alone would raise for an unhashable or array-like value with its own message.
    if not any(value is a or (isinstance(value, str) and value == a) for a in allowed):
        names = " or ".join("null (None)" if a is None else f'"{a}"' for a in allowed)
        raise ConfigError(field, value, names)


def _block_pair(value: Any) -> tuple[int, int]:
    allowed = "a positive int or a pair of positive ints (out, in)"

    def is_size(v: Any) -> bool:
        return isinstance(v, int | np.integer) and not isinstance(v, bool) and int(v) > 0

    pair = (value, value) if is_size(value) else value
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(map(is_size, pair)):
        raise ConfigError("weight_block_size", value, allowed)
    return int(pair[0]), int(pair[1])


def _names(field: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Sequence | set | frozenset):
        raise ConfigError(field, value, "a list of module paths")
    names = tuple(value)
    if not all(isinstance(name, str) and name for name in names):
        raise ConfigError(field, value, "a list of module paths (non-empty strings)")
    return names
