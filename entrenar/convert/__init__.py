"""Models and tokenizers, from here into the files of other programs and back: GGUF (llama.cpp), .bin (llama2.c)."""

from __future__ import annotations

import numpy as np

from entrenar.formats import FormatError


class ConvertError(FormatError):
    """This model or tokenizer cannot be said in that format; the message names why, and the way out."""


def interleave(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q_proj or k_proj from rotate-half order, (half, pair) in each head, to pairs side by side (pair, half).

    RoPE turns the pairs (i, i + D/2) in Hugging Face's files and here, (2i, 2i + 1) in Meta's, GGUF and llama2.c.
    w (H D, ...) -> a copy (H D, ...)
    """
    return w.reshape(heads, 2, len(w) // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def deinterleave(w: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `interleave`: from pairs side by side to rotate-half order."""
    return w.reshape(heads, len(w) // heads // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
