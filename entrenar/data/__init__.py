"""Text on its way to the model: corpora, tokenizers, a prepared and cached corpus, batches."""

from entrenar.data.batches import IGNORE, Batches, batched, evaluation_windows
from entrenar.data.corpus import Corpus, CorpusError, find_sources, read_corpus
from entrenar.data.prepared import Facts, Prepared, bits_per_byte, prepare
from entrenar.data.tokenizer import (
    END,
    BPETokenizer,
    ByteTokenizer,
    Tokenizer,
    TokenizerError,
    load_tokenizer,
    train_bpe,
)

__all__ = [
    "END",
    "IGNORE",
    "BPETokenizer",
    "Batches",
    "ByteTokenizer",
    "Corpus",
    "CorpusError",
    "Facts",
    "Prepared",
    "Tokenizer",
    "TokenizerError",
    "batched",
    "bits_per_byte",
    "evaluation_windows",
    "find_sources",
    "load_tokenizer",
    "prepare",
    "read_corpus",
    "train_bpe",
]
