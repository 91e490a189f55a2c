"""Attention of one new token to a cache of keys and values: one op, several implementations."""

from jaxquant.attention.api import decode_attention as decode_attention
