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
        """`model_type`, or what the architecture's name says: llama for LlamaForCausalLM."""
        architecture = str(next(iter(self.fields.get("architectures") or ()), ""))
        default = architecture.removesuffix("ForCausalLM").lower()
        return str(self.fields.get("model_type") or default)

    def error(self, field: str, allowed: str) -> CheckpointError:
        """The error for a field that is not allowed."""
        return CheckpointError(
            f"{self.source}: {field} is {self.fields.get(field)!r}; allowed: {allowed}"
        )

    def size(self, field: str, *, default: int | None = None) -> int:
        """A positive int; required unless there is a default."""
        value = self.fields.get(field)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise self.error(field, "a positive integer below 2^31")
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

    def optional_number(self, field: str, *, default: float | None = None) -> float | None:
        """A positive number, or None if the field is null; `default` if it is missing."""
        value = self.fields.get(field, default)
        return None if value is None else self.number(field, default=default)

    def count(self, field: str, *, default: int) -> int:
        """An int that is not negative."""
        value = self.fields.get(field)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.error(field, "an integer that is not negative")
        return value

    def choice(self, field: str, allowed: tuple[str, ...], *, default: str) -> str:
        """One of the allowed strings."""
        value = self.fields.get(field)
        value = default if value is None else value
        if not isinstance(value, str) or value not in allowed:
            raise self.error(field, ", ".join(map(repr, allowed)))
        return value

    def layer_types(
        self, n: int, *, default: tuple[str, ...], allowed: tuple[str, ...]
    ) -> tuple[str, ...]:
        """`layer_types`: a name for each of n layers."""
        value = self.fields.get("layer_types")
        value = default if value is None else value
        if (
            not isinstance(value, list | tuple)
            or len(value) != n
            or any(v not in allowed for v in value)
        ):
            raise self.error("layer_types", f"a list of {n} of {', '.join(map(repr, allowed))}")
        return tuple(value)

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

    def section(self, field: str) -> "HFConfig":
        """A JSON object inside; empty if the field is null or missing."""
        value = self.fields.get(field)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(field, "null or an object")
        return HFConfig(value or {}, f"{self.source}: {field}")

    def rope(
        self,
        head_dim: int,
        *,
        partial: float | None = None,
        theta: float = 10000.0,
        interleaved: bool = False,
    ) -> Rope:
        """The rotary embedding, from `rope_parameters` or the older fields.

        Args:
          head_dim: dims of a head.
          partial: default of `partial_rotary_factor`; None refuses to rotate a part.
          theta: default of `rope_theta`.
          interleaved: which pairs are rotated; see `Rope`.
        """
        new = self.fields.get("rope_parameters") is not None
        if new and self.fields.get("rope_scaling") is not None:
            raise self.error("rope_scaling", "null, since there is rope_parameters")
        rope = self.section("rope_parameters" if new else "rope_scaling")
        return self.rope_of(
            rope,
            head_dim,
            theta=self.number("rope_theta", default=theta),
            partial=partial,
            interleaved=interleaved,
        )

    def rope_of(
        self,
        rope: "HFConfig",
        head_dim: int,
        *,
        theta: float,
        partial: float | None = None,
        interleaved: bool = False,
    ) -> Rope:
        """The rotary embedding of one section, where a model has several; see `rope`.

        Args:
          rope: the section.
          head_dim: dims of a head.
          theta: default of its `rope_theta`.
          partial: default of `partial_rotary_factor`; None refuses to rotate a part.
          interleaved: which pairs are rotated.
        """
        kind = rope.fields.get("rope_type") or rope.fields.get("type") or "default"
        if not isinstance(kind, str) or kind not in _ROPE_FIELDS:
            raise CheckpointError(
                f"{rope.source} has rope_type {kind!r}; allowed: {', '.join(_ROPE_FIELDS)}"
            )
        allowed = ("rope_type", "type", "rope_theta", "partial_rotary_factor", *_ROPE_FIELDS[kind])
        for field in rope.fields:
            if field not in allowed:
                raise rope.error(field, f"with rope_type {kind!r} only {', '.join(allowed)}")
        options: dict[str, Any] = {"interleaved": interleaved}
        if kind != "default":
            options |= {"scaling": kind, "factor": rope.number("factor")}
        if kind == "dynamic":
            options["original_max_position"] = self.size("max_position_embeddings")
        if kind == "llama3":
            low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
            if high <= low:
                raise rope.error("high_freq_factor", f"more than low_freq_factor ({low})")
            options |= {
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position": rope.size("original_max_position_embeddings"),
            }
        if kind == "yarn":
            options |= self._yarn(rope)
        dim = self._rotary_dim(rope, head_dim, partial)
        theta = rope.number("rope_theta", default=theta)
        if kind == "dynamic" and dim == 2:
            raise self.error("head_dim", "more with rope_type 'dynamic'")
        if kind == "yarn" and theta <= 1:
            where = rope if "rope_theta" in rope.fields else self
            raise where.error("rope_theta", "more than 1 with rope_type 'yarn'")
        return Rope(dim, theta, **options)

    def _rotary_dim(self, rope: "HFConfig", head_dim: int, partial: float | None) -> int:
        field, dim = "partial_rotary_factor", head_dim
        if partial is None:
            self.require(field, (None, 1.0), default=1.0)
            rope.require(field, (None, 1.0), default=1.0)
        else:
            factor = rope.number(field, default=self.number(field, default=partial))
            if factor > 1:
                raise (rope if field in rope.fields else self).error(field, "at most 1")
            dim = int(head_dim * factor)
        if dim % 2 or not dim:
            rotated = "" if dim == head_dim else f", of which {dim} dims are rotated"
            raise CheckpointError(
                f"{self.source}: head_dim is {head_dim}{rotated}; allowed: an even number"
            )
        return dim

    def _yarn(self, rope: "HFConfig") -> dict[str, Any]:
        factor = rope.number("factor")
        mscale, all_dim = map(rope.optional_number, ("mscale", "mscale_all_dim"))

        def attention(mscale: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

        ratio = attention(mscale) / attention(all_dim) if mscale and all_dim else attention(1.0)
        return {
            "original_max_position": rope.size(
                "original_max_position_embeddings",
                default=self.optional_size("original_max_position_embeddings")
                or self.size("max_position_embeddings"),
            ),
            "beta_fast": rope.number("beta_fast", default=32.0),
            "beta_slow": rope.number("beta_slow", default=1.0),
            "truncate": rope.flag("truncate", default=True),
            "attention_factor": rope.number("attention_factor", default=ratio),
        }


# rope_type -> the fields that it has.
_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
