"""A tiny model and adapters beside it, for tests of what is done with them after fine-tuning."""

from __future__ import annotations

import functools
import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

from conftest import SAME_PACKAGE

from entrenar import random
from entrenar.adapters import LoraConfig, adapt, save_adapter, write_adapter
from entrenar.cli.conversation import Conversation, Manner
from entrenar.cli.models import open_model
from entrenar.data import ByteTokenizer
from entrenar.data.chat import load_template
from entrenar.llama import Llama, LlamaConfig
from entrenar.llama.generate import Sampling
from entrenar.training.base import identity_of
from entrenar.training.checkpoint import save_step

SHAPE = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3, "rms_norm_eps": 1e-5,
         "bos_token_id": 256, "eos_token_id": 256}  # fmt: skip
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def base(path: Path, *, seed: int = 1, template: str | None = None, **shape: int) -> Path:
    """A model of bytes in Hugging Face's layout, perhaps with a chat template."""
    random.seed(seed)
    files = {} if template is None else {"chat_template.jinja": template.encode()}
    return Llama(LlamaConfig(**SHAPE | shape)).save_pretrained(path, tokenizer=ByteTokenizer(files))


def adapted(folder: Path, name: str = "default", *, seed: int = 2, size: float = 8.0, **settings: object) -> Llama:
    """The model in `folder` with an adapter that changes what it says."""
    model = Llama.from_pretrained(folder)
    random.seed(seed)
    config = {"r": 4, "lora_alpha": size, "target_modules": "all-linear", "init_lora_weights": False}
    adapt(model, LoraConfig(**config | settings, base_model_name_or_path=str(folder)), name)
    return model


def adapter(path: Path, folder: Path, **settings: object) -> Path:
    """An adapter for the model in `folder`, as PEFT keeps one."""
    return save_adapter(adapted(folder, **settings), path)


def run(path: Path, folder: Path, *, storage: str = "auto", steps: tuple[int, ...] = (4,), **settings: object) -> Path:
    """A fine-tuning run's folder, as it is left behind, without what is not needed after it."""
    path.mkdir()
    model = adapted(folder, **settings)
    state = {
        "base": {"folder": str(folder), "identity": identity_of(folder)},
        "config": {"base": {"model": str(folder), "storage": storage}, "data": {"max_length": 64}},
    }

    def write(temporary: Path) -> None:
        write_adapter(temporary, model)
        ByteTokenizer().save(temporary)

    for step in steps:
        save_step(path, step, write=write, state={"step": step, **state}, best=step == steps[0])
    return path


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Terminal:
    """`entrenar ...` at a terminal of so many columns: what is typed, and what is seen."""

    def __init__(self, *words: object, columns: int = 100, before: str = "") -> None:
        script = f"{before}\nimport sys\nfrom entrenar.cli import main\nsys.exit(main({[str(w) for w in words]!r}))"
        self.screen, inside = pty.openpty()
        environment = SAME_PACKAGE | {"TERM": "xterm", "NO_COLOR": "1", "OMP_NUM_THREADS": "1",
                                      "COLUMNS": str(columns), "LINES": "40"}  # fmt: skip
        self.process = subprocess.Popen([sys.executable, "-c", script], stdin=inside, stdout=inside, stderr=inside,
                                        env=environment, start_new_session=True,
                                        preexec_fn=functools.partial(_control, inside))  # fmt: skip
        os.close(inside)
        self.seen = ""

    def until(self, text: str, seconds: float = 60) -> str:
        """What is seen since the last time, up to and with this text."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            if time.monotonic() > end:
                raise AssertionError(f"{text!r} did not come; seen: {self.seen!r}")
            ready, _, _ = select.select([self.screen], [], [], 0.2)
            if ready:
                try:
                    new = os.read(self.screen, 1 << 16)
                except OSError:  # Linux: the other side is closed
                    new = b""
                if not new:
                    raise AssertionError(f"it ended before {text!r} came; seen: {self.seen!r}")
                self.seen += new.decode(errors="replace").replace("\r\n", "\n")
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def say(self, line: str, until: str = "\n> ") -> str:
        """Type a line; what is seen up to the next prompt."""
        self.type(line + "\n")
        return self.until(until)

    def end(self) -> int:
        """The exit code; what is still written is read away."""
        while self.process.poll() is None:
            ready, _, _ = select.select([self.screen], [], [], 0.2)
            try:
                if ready and not os.read(self.screen, 1 << 16):
                    break
            except OSError:
                break
        os.close(self.screen)
        return self.process.wait(30)


def _control(number: int) -> None:
    """Let the terminal be the process's own: Ctrl-C in it is a signal."""
    import fcntl
    import termios

    fcntl.ioctl(number, termios.TIOCSCTTY, 0)


def conversation(folder: Path, *, max_tokens: int = 12, **settings: object) -> Conversation:
    """With the model in a folder; the likeliest tokens are chosen."""
    opened = open_model(folder, **settings)
    template = load_template(opened.tokenizer)
    return Conversation(opened, template, Manner(Sampling(temperature=0), max_tokens), by=opened.turns[0])


def said(talk: Conversation, prompt: str) -> str:
    """Ask, keep the answer, and give it back."""
    answer = talk.ask(prompt)
    text = "".join(answer)
    talk.keep(answer)
    return text
