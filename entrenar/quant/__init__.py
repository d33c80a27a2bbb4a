"""Storage formats of frozen weights: from floats, from bitsandbytes' files and back, and how far off they are.

What a Packed is says `entrenar/kernels/packed.py`; which weights of a model become one, `entrenar/llama/packed.py`.
"""

from entrenar.quant.blockwise import QuantizeError, quantize
from entrenar.quant.errors import half_step, output_error

__all__ = ["QuantizeError", "half_step", "output_error", "quantize"]
