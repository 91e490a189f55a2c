"""Attention over a cache of keys and values, and what fills it: ops with implementations."""

from jaxquant.attention.api import (
    append_and_attend as append_and_attend,
    decode_attention as decode_attention,
)
from jaxquant.attention.cache import (
    append as append,
    empty as empty,
    fill as fill,
    of_layer as of_layer,
)
from jaxquant.attention.fp8 import (
    Units as Units,
    fp8_attention as fp8_attention,
    fp8_units as fp8_units,
    in_units as in_units,
)
from jaxquant.attention.prefill import rotate_and_fill as rotate_and_fill
from jaxquant.attention.xla import rotate_halves as rotate_halves
