"""The operators: tensors in, tensors out, each a ``torch.ops.trimtab.*`` op underneath."""

from .int8_linear import int8_linear
from .int8_mm import int8_mm
from .int8_pack import int8_pack, int8_unpack
from .isa import available_isas, get_isa, set_isa
from .quantize_int8 import quantize_int8

__all__ = [
    "available_isas",
    "get_isa",
    "int8_linear",
    "int8_mm",
    "int8_pack",
    "int8_unpack",
    "quantize_int8",
    "set_isa",
]
