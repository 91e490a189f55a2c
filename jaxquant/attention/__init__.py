"""Attention of one new token to a cache of keys and values: ops with several implementations."""

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
from jaxquant.attention.xla import rotate_halves as rotate_halves
