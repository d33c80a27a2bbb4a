"""Writing text with a model in NF4: a token at a time, and a prompt at once.

Against transformers with bitsandbytes on the same folder, and against our own bfloat16: there three and a half times
as many bytes come from memory for each token, which is what decoding waits for. Logits after the prompt must agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from benchmarks.arrays import agree, fingerprint, integers
from benchmarks.driver import Agreement, Bench, Times
from benchmarks.groups import bases
from benchmarks.protocol import Case
from benchmarks.report import Row, Target
from benchmarks.spread import Spread

PROMPT = 16  # tokens before the first that is timed
LONGEST = 128  # tokens until the text begins anew: attention costs next to nothing all the way
FEW_ROUNDS = 3
TOLERANCE = 1e-3  # of the logits' length, in float32; bfloat16 has 8 binary digits, and errors add up over the layers:
TOLERANCE_BFLOAT16 = 0.1
GB = 1e9

NF4, BFLOAT16 = "entrenar-nf4", "entrenar-bfloat16"
PEER_FLOAT32, PEER_BFLOAT16 = "torch-float32", "torch-bfloat16"


# -- contenders


def with_entrenar(kind: str, model: str, base: str, adapter: str, tokens: int) -> Case:
    """tokens = 1: the next token of a text; more: a prompt of so many."""
    from entrenar.llama import Llama, generate
    from entrenar.llama.model import KVCache
    from entrenar.tensor import no_grad

    llama = Llama.from_pretrained(base)
    if kind == BFLOAT16:
        to_bfloat16(llama)
    prompt = first_tokens(model, max(tokens, PROMPT))
    with no_grad():
        last = llama(prompt[None]).data[0, -1]

    def read() -> None:
        with no_grad():
            cache = KVCache(llama.config, capacity=len(prompt))
            llama.logits(llama.hidden(prompt[None], cache)[:, -1:])

    def texts() -> Iterator[int]:
        while True:
            yield from generate(llama, prompt, max_new_tokens=LONGEST, temperature=0)

    text = texts()
    next(text)  # reads the prompt
    return Case(read if tokens > 1 else partial(next, text), fingerprint(last))


def to_bfloat16(llama: Any) -> None:
    from entrenar import kernels
    from entrenar.llama.packed import place
    from entrenar.quant import quantize

    for name, packed in list(llama.named_packed()):
        place(llama, name, quantize(kernels.unpack(packed), "bfloat16"))


def with_torch(compute: str, model: str, base: str, adapter: str, tokens: int) -> Case:
    """What `generate` does for each token, without what it does around: the model, its cache, the best token."""
    import torch
    from transformers import DynamicCache

    llama = bases.torch_model(base, compute, compute).eval()
    prompt = torch.from_numpy(first_tokens(model, max(tokens, PROMPT)))[None]
    cache, ids = DynamicCache(), prompt

    def read() -> torch.Tensor:
        with torch.inference_mode():
            return llama(prompt, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1).logits[0, -1]

    def next_token() -> None:
        nonlocal cache, ids
        if cache.get_seq_length() > LONGEST:
            cache, ids = DynamicCache(), prompt
        with torch.inference_mode():
            logits = llama(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1:].argmax(-1)

    last = read().float().numpy()
    next_token()  # reads the prompt
    return Case(read if tokens > 1 else next_token, fingerprint(last))


CONTENDERS = {
    NF4: partial(with_entrenar, NF4),
    BFLOAT16: partial(with_entrenar, BFLOAT16),
    PEER_FLOAT32: partial(with_torch, "float32"),
    PEER_BFLOAT16: partial(with_torch, "bfloat16"),
}


def first_tokens(model: str, count: int) -> np.ndarray:
    return integers(1, bases.MODELS[model]["vocab_size"], count)


# -- the driver's side


def within(tolerance: float, a: list[float], b: list[float]) -> bool:
    return agree(a, b, tolerance=tolerance)


# bitsandbytes' kernel for a model that is not trained computes in bfloat16, whatever it was asked for.
AGREE: dict[str, Agreement] = dict.fromkeys(
    (BFLOAT16, PEER_FLOAT32, PEER_BFLOAT16), partial(within, TOLERANCE_BFLOAT16)
)


def rows(bench: Bench, model: str = "1.1b", prompt: int = 256) -> Iterator[Row]:
    contenders = bench.present((NF4, BFLOAT16, PEER_FLOAT32, PEER_BFLOAT16))
    with bases.written(bench, model) as folders:
        workers = {name: bench.start(name) for name in contenders}
        try:
            how: dict[str, Any] = dict(seconds=0.5, rounds=min(bench.rounds, FEW_ROUNDS), agree=AGREE, workers=workers)
            times = bench.race("decode", contenders, model=model, tokens=1, **folders, **how)
            peaks = {name: worker.peak() for name, worker in workers.items()}
            reading = bench.race("decode", contenders, model=model, tokens=prompt, **folders, **how)
        finally:
            for worker in workers.values():
                worker.close()
    yield from decoding(bench, f"{model} decoding in NF4", times, peaks)
    speed = {name: prompt / reading.of(name).median for name in contenders}
    note = ", ".join(f"{name} {tokens:.0f} tokens/s" for name, tokens in speed.items())
    peer = reading.best_peer(of=NF4) if contenders[2:] else None
    what = f"{model} in NF4, a prompt of {prompt} tokens"
    ratio = reading.speedup(of=NF4, over=faster_peer(reading)) if peer else Spread.of([speed[NF4]])
    yield Row("decode", f"{what}: speed over transformers" if peer else f"{what}: speed", "x" if peer else "tokens/s",
              ratio, None, "", note)  # fmt: skip


def faster_peer(times: Times) -> str:
    return min((name for name in times.seconds if name.startswith("torch")), key=lambda name: times.of(name).median)


def decoding(bench: Bench, what: str, times: Times, peaks: dict[str, int]) -> Iterator[Row]:
    speed = {name: 1 / times.of(name).median for name in times.seconds}
    details = {"tokens_per_second": speed, "peak_bytes": peaks, "seconds": times.seconds}
    if bench.torch_missing:
        note = bench.torch_missing
        yield Row("decode", f"{what}: speed", "tokens/s", Spread.of([speed[NF4]]), None, "", note, details)
    else:
        peer = faster_peer(times)
        note = f"{speed[NF4]:.1f} tokens/s to {speed[PEER_FLOAT32]:.2f} of bitsandbytes in float32, " \
               f"{speed[PEER_BFLOAT16]:.2f} in bfloat16"  # fmt: skip
        ratio = times.speedup(of=NF4, over=peer)
        yield Row("decode", f"{what}: speed over transformers", "x", ratio, Target(">=", 30.0), "", note, details)
    note = f"{speed[NF4]:.1f} tokens/s to {speed[BFLOAT16]:.1f}"
    ratio = times.speedup(of=NF4, over=BFLOAT16)
    yield Row("decode", f"{what}: speed over our bfloat16", "x", ratio, Target(">", 1.0), "", note)
    others = ", ".join(f"{name} {peak / GB:.2f}" for name, peak in peaks.items() if name != NF4)
    memory = Spread.of([peaks[NF4] / GB])
    yield Row("decode", f"{what}: peak memory", "GB", memory, Target("<=", 1.2), "", f"whole process; {others}")
