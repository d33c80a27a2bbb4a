"""LLaMA: its configuration, the model itself, and generation with a key/value cache."""

from entrenar.llama.config import LlamaConfig
from entrenar.llama.generate import Reader, generate
from entrenar.llama.model import KVCache, Llama

__all__ = ["KVCache", "Llama", "LlamaConfig", "Reader", "generate"]
