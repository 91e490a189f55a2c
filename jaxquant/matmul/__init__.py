"""Matrix products with a blocked FP8 weight: one op, several implementations."""

from jaxquant.matmul.api import matmul as matmul
