"""Text on its way to the model: corpora, tokenizers, a prepared and cached corpus, batches."""

from entrenar.data.batches import IGNORE, Batch, Batches, batched, evaluation_windows
from entrenar.data.corpus import CorpusError, find_sources
from entrenar.data.documents import read_documents
from entrenar.data.prepared import Facts, Prepared, bits_per_byte, load_prepared
from entrenar.data.preparing import prepare
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
    "Batch",
    "Batches",
    "ByteTokenizer",
    "CorpusError",
    "Facts",
    "Prepared",
    "Tokenizer",
    "TokenizerError",
    "batched",
    "bits_per_byte",
    "evaluation_windows",
    "find_sources",
    "load_prepared",
    "load_tokenizer",
    "prepare",
    "read_documents",
    "train_bpe",
]
