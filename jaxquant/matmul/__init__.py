"""Matrix products with a blocked FP8 weight: one op, several implementations."""

from jaxquant.matmul.api import matmul as matmul
from jaxquant.matmul.grouped import grouped_matmul as grouped_matmul
from jaxquant.matmul.mlp import gated_mlp as gated_mlp
from jaxquant.matmul.prologue import Prologue as Prologue, RMSNorm as RMSNorm, SiluMul as SiluMul
from jaxquant.matmul.routing import Routed as Routed, Routing as Routing, route as route
from jaxquant.matmul.tokens import QuantizedTokens as QuantizedTokens
