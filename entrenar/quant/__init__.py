"""Storage formats of frozen weights: from floats, from bitsandbytes' files and back, and how far off they are.

What a Packed is says `entrenar/kernels/packed.py`; which weights of a model become one, `entrenar/llama/packed.py`.
"""

from entrenar.quant.blockwise import QuantizeError, quantize

__all__ = ["QuantizeError", "quantize"]
