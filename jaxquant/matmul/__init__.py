"""Matrix products with a blocked FP8 weight: one op, several implementations."""

from jaxquant.matmul.api import matmul as matmul
from jaxquant.matmul.grouped import grouped_matmul as grouped_matmul
