"""Fine-tuning data: rows of JSONL in any of the common shapes, to examples whose answers are trained, to batches.

Reading order: rows.py (what a row says), sources.py (files), template.py and sandbox.py (a conversation as text),
rendering.py (its tokens, and which are trained), examples.py, packing.py (batches), dataset.py (all of it together).
"""

from entrenar.data.chat.dataset import ChatData, ChatFacts, read_examples
from entrenar.data.chat.examples import Examples
from entrenar.data.chat.packing import ChatBatch, ExampleBatches, Packing, evaluation_batches
from entrenar.data.chat.rendering import TRAIN_ON, Example
from entrenar.data.chat.rows import Keys
from entrenar.data.chat.template import ChatTemplate, TemplateError, keep_template, load_template

__all__ = [
    "TRAIN_ON",
    "ChatBatch",
    "ChatData",
    "ChatFacts",
    "ChatTemplate",
    "Example",
    "ExampleBatches",
    "Examples",
    "Keys",
    "Packing",
    "TemplateError",
    "evaluation_batches",
    "keep_template",
    "load_template",
    "read_examples",
]
