"""Checked access to a Hugging Face config.json."""

import math
from collections.abc import Mapping
from typing import Any

from jaxquant.errors import CheckpointError
from jaxquant.models.layers import Rope


class HFConfig:
    """A config.json whose fields are read with their types checked.

    Args:
      fields: the parsed JSON object.
      source: the file, for messages.
    """

    def __init__(self, fields: Mapping[str, Any], source: str = "config.json"):
        self.fields = fields
        self.source = source

    @property
    def model_type(self) -> str:
        """`model_type`, or an empty string."""
        return str(self.fields.get("model_type", ""))

    def error(self, field: str, allowed: str) -> CheckpointError:
        """The error for a field that is not allowed."""
        return CheckpointError(
            f"{self.source}: {field} is {self.fields.get(field)!r}; allowed: {allowed}"
        )

    def size(self, field: str, *, default: int | None = None) -> int:
        """A positive int; required unless there is a default."""
        value = self.fields.get(field)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self.error(field, "a positive integer")
        return value

    def optional_size(self, field: str, *, default: int | None = None) -> int | None:
        """A positive int, or None if the field is null; `default` if it is missing."""
        value = self.fields.get(field, default)
        return None if value is None else self.size(field, default=default)

    def number(self, field: str, *, default: float | None = None) -> float:
        """A positive number; required unless there is a default."""
        value = self.fields.get(field)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(field, "a positive number")
        if not 0 < value < math.inf:
            raise self.error(field, "a positive number")
        return float(value)

    def flag(self, field: str, *, default: bool) -> bool:
        """true or false."""
        value = self.fields.get(field)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.error(field, "true or false")
        return value

    def require(self, field: str, allowed: tuple, *, default: Any) -> None:
        """Refuses a field with any value but the allowed ones."""
        if self.fields.get(field, default) not in allowed:
            raise self.error(field, ", ".join(map(repr, allowed)))

    def rope(self, dim: int) -> Rope:
        """The rotary embedding of heads of `dim`, from `rope_parameters` or the older fields."""
        if dim % 2:
            raise CheckpointError(f"{self.source}: head_dim is {dim}; allowed: an even number")
        new = self.fields.get("rope_parameters") is not None
        field = "rope_parameters" if new else "rope_scaling"
        rope = self.fields.get(field) or {}
        if not isinstance(rope, Mapping):
            raise self.error(field, "null or an object")
        sub = HFConfig(rope, f"{self.source}: {field}")
        theta = sub.number("rope_theta", default=self.number("rope_theta", default=10000.0))
        self.require("partial_rotary_factor", (None, 1.0), default=1.0)
        sub.require("partial_rotary_factor", (None, 1.0), default=1.0)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "default":
            return Rope(dim, theta)
        if kind == "linear":
            return Rope(dim, theta, "linear", factor=sub.number("factor"))
        if kind == "llama3":
            low, high = sub.number("low_freq_factor"), sub.number("high_freq_factor")
            if high <= low:
                raise sub.error("high_freq_factor", f"more than low_freq_factor ({low})")
            return Rope(
                dim,
                theta,
                "llama3",
                factor=sub.number("factor"),
                low_freq_factor=low,
                high_freq_factor=high,
                original_max_position=sub.size("original_max_position_embeddings"),
            )
        raise CheckpointError(
            f"{self.source}: {field} has rope_type {kind!r}; allowed: default, linear, llama3"
        )
