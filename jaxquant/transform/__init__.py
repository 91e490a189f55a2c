"""`fp8`: functions of ordinary arrays, run on QuantizedArrays."""

from jaxquant.transform.api import fp8 as fp8, fp8_report as fp8_report
from jaxquant.transform.usage import Fp8Report as Fp8Report
