"""What a process holds beside a run's arrays: measured in this very one, once it has touched the code a run touches."""

from __future__ import annotations

import contextlib
import functools
import tempfile

import numpy as np

from entrenar import kernels, optim, random
from entrenar.data import load_tokenizer, train_bpe
from entrenar.llama import Llama, LlamaConfig, generate
from entrenar.training import machine
from entrenar.training.curve import Curve, render


def measured_program() -> int:
    """Bytes this process holds beside the run's arrays: interpreter, libraries, all code that a run goes through."""
    _go_through_the_code()
    kernels.give_back_scratch()  # a run's own is counted among its arrays
    machine.give_back_memory()
    return machine.memory_used()


@functools.cache  # once in a process
def _go_through_the_code() -> None:
    """Train, save and draw something tiny: code becomes resident when it first runs. Leaves no trace but that."""
    before = random.get_state()
    shape = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                        num_attention_heads=2, max_position_embeddings=32)  # fmt: skip
    try:
        for checkpointing in (False, True):
            model = Llama(shape, checkpointing=checkpointing)
            optimizer = optim.AdamW(model.named_parameters())
            ids = np.arange(2 * 32).reshape(2, 32)
            model.loss(ids, ids).backward()
            optimizer.step(grad_scale=optim.clip_scale(optim.global_norm(model.parameters()), 1.0))
        list(generate(model, [1], max_new_tokens=2, top_p=0.9))
        with contextlib.suppress(OSError), tempfile.TemporaryDirectory() as folder:  # no room: nothing to go through
            model.save_pretrained(folder, tokenizer=train_bpe(["a text\n"], vocab_size=260))
            load_tokenizer(folder).encode("a text")
    finally:
        random.set_state(before)
    render(Curve("", "", [(1, 2.0), (2, 1.0)], [(2, 1.0)], [("", 1.0)], size=(64, 48)))
    from rich import live, panel, progress_bar, table  # noqa: F401  (what the display draws with)
