"""The operators: tensors in, tensors out, each a ``torch.ops.trimtab.*`` op underneath."""

from . import backend, library, sparse_fallback
from .bitmap_conv2d import bitmap_conv2d
from .bitmap_linear import bitmap_check, bitmap_linear, bitmap_pack, bitmap_unpack
from .block_linear import block_check, block_linear, block_pack, block_unpack
from .int8_conv2d import int8_conv2d, int8_conv2d_pack, int8_conv2d_unpack
from .int8_embedding import int8_embedding
from .int8_embedding_bag import int8_embedding_bag
from .int8_linear import int8_linear
from .int8_mm import int8_mm
from .int8_pack import int8_pack, int8_unpack
from .int8_weight_mm import int8_weight_mm
from .isa import available_isas, get_isa, set_isa
from .quantize_affine import dequantize_affine, quantize_affine
from .quantize_int8 import quantize_int8
from .rms_norm_quantize_int8 import rms_norm_quantize_int8
from .silu_mul_quantize_int8 import silu_mul_quantize_int8
from .sparse24_compress import sparse24_compress, sparse24_unpack
from .sparse24_linear import (
    sparse24_linear,
    sparse24_metadata,
    sparse24_pack,
    sparse24_pack_both,
)

library.implement_in_triton()
sparse_fallback.register()
backend.check_forced()
if backend.FORCED == "reference":
    from . import reference_backend

    reference_backend.register()

__all__ = [
    "available_isas",
    "bitmap_check",
    "bitmap_conv2d",
    "bitmap_linear",
    "bitmap_pack",
    "bitmap_unpack",
    "block_check",
    "block_linear",
    "block_pack",
    "block_unpack",
    "dequantize_affine",
    "get_isa",
    "int8_conv2d",
    "int8_conv2d_pack",
    "int8_conv2d_unpack",
    "int8_embedding",
    "int8_embedding_bag",
    "int8_linear",
    "int8_mm",
    "int8_pack",
    "int8_unpack",
    "int8_weight_mm",
    "quantize_affine",
    "quantize_int8",
    "rms_norm_quantize_int8",
    "set_isa",
    "silu_mul_quantize_int8",
    "sparse24_compress",
    "sparse24_unpack",
    "sparse24_linear",
    "sparse24_metadata",
    "sparse24_pack",
    "sparse24_pack_both",
]
