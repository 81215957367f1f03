"""PEFT's LoRA layers on quantised base layers with a fused forward, and the table of all classes that can be fused.

PEFT defines a class only where the library it is for is installed.
"""

from peft.tuners.lora import bnb, hqq
from peft.tuners.lora.layer import Embedding, Linear
from peft.tuners.lora.torchao import TorchaoLoraLinear

from .conv import FUSED_CONVOLUTIONS
from .embedding import FusedEmbedding
from .layer import FusedForward, FusedLinear
from .packed_layer import PackedLoraLinear


class FusedTorchaoLoraLinear(FusedForward, TorchaoLoraLinear):
    """On a weight that torchao dequantises."""

    peft_class = TorchaoLoraLinear


class FusedPackedLoraLinear(FusedForward, PackedLoraLinear):
    """On FP8, FP4 and int4, decoded inside the kernels."""

    peft_class = PackedLoraLinear


FUSED = {
    Linear: FusedLinear,
    TorchaoLoraLinear: FusedTorchaoLoraLinear,
    PackedLoraLinear: FusedPackedLoraLinear,
    Embedding: FusedEmbedding,
    **FUSED_CONVOLUTIONS,
}
"""The fused class of each of PEFT's."""

if hasattr(bnb, "Linear4bit"):

    class FusedLinear4bit(FusedForward, bnb.Linear4bit):
        """On bitsandbytes' 4 bits: NF4 is decoded inside the kernels, FP4 by bitsandbytes."""

        peft_class = bnb.Linear4bit

    FUSED[bnb.Linear4bit] = FusedLinear4bit

if hasattr(bnb, "Linear8bitLt"):

    class FusedLinear8bitLt(FusedForward, bnb.Linear8bitLt):
        """On bitsandbytes' 8 bits, dequantised by it."""

        peft_class = bnb.Linear8bitLt

    FUSED[bnb.Linear8bitLt] = FusedLinear8bitLt

if hasattr(hqq, "HqqLoraLinear"):

    class FusedHqqLoraLinear(FusedForward, hqq.HqqLoraLinear):
        """On a layer that HQQ dequantises."""

        peft_class = hqq.HqqLoraLinear

    FUSED[hqq.HqqLoraLinear] = FusedHqqLoraLinear
