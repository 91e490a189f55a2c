"""Attention of one new token to a cache of keys and values: ops with several implementations."""

from jaxquant.attention.api import (
    append_and_attend as append_and_attend,
    decode_attention as decode_attention,
)
from jaxquant.attention.xla import append as append, rotate_halves as rotate_halves
