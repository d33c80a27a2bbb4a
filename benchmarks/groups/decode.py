"""Writing text with a model in NF4: a token at a time, and a prompt at once.

Against transformers with bitsandbytes on the same folder, and against our own bfloat16: there three and a half times
as many bytes come from memory for each token, which is what decoding waits for. Logits after the prompt must agree.

bitsandbytes has a kernel for this on processors that have AVX-512 with bfloat16; the third of its contenders does
without, as it does everywhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.driver import Agreement, Bench, Times, is_peer
from benchmarks.groups import bases, writing
from benchmarks.protocol import Case
from benchmarks.report import Row, Target
from benchmarks.spread import Spread

TOLERANCE = 1e-3  # of the logits' length, in float32
GB = 1e9

NF4, BFLOAT16 = "entrenar-nf4", "entrenar-bfloat16"
PEER_FLOAT32, PEER_BFLOAT16, PEER_PORTABLE = "torch-float32", "torch-bfloat16", "torch-portable"
NAMES = {
    PEER_FLOAT32: "transformers in float32",
    PEER_BFLOAT16: "transformers in bfloat16",
    PEER_PORTABLE: "bitsandbytes without its AVX-512 kernel",
}


# -- contenders


def with_entrenar(kind: str, model: str, base: str, adapter: str, tokens: int) -> Case:
    from entrenar.llama import Llama

    llama = Llama.from_pretrained(base)
    if kind == BFLOAT16:
        to_bfloat16(llama)
    return writing.ours(llama, writing.prompt_of(model, tokens), tokens)


def to_bfloat16(llama: Any) -> None:
    from entrenar import kernels
    from entrenar.llama.packed import place
    from entrenar.quant import quantize

    for name, packed in list(llama.named_packed()):
        place(llama, name, quantize(kernels.unpack(packed), "bfloat16"))


def with_torch(compute: str, portable: bool, model: str, base: str, adapter: str, tokens: int) -> Case:
    llama = bases.torch_model(base, compute, compute, portable=portable).eval()
    return writing.of_torch(llama, writing.prompt_of(model, tokens), tokens)


CONTENDERS = {
    NF4: partial(with_entrenar, NF4),
    BFLOAT16: partial(with_entrenar, BFLOAT16),
    PEER_FLOAT32: partial(with_torch, "float32", False),
    PEER_BFLOAT16: partial(with_torch, "bfloat16", False),
    PEER_PORTABLE: partial(with_torch, "float32", True),
}


# -- the driver's side


# bitsandbytes' kernel for a model that is not trained computes in bfloat16, whatever it was asked for.
AGREE: dict[str, Agreement] = {
    **dict.fromkeys((BFLOAT16, PEER_FLOAT32, PEER_BFLOAT16), partial(writing.within, writing.TOLERANCE_BFLOAT16)),
    PEER_PORTABLE: partial(writing.within, TOLERANCE),
}


def rows(bench: Bench, model: str = "1.1b", prompt: int = 256) -> Iterator[Row]:
    # Held to AVX2, PyTorch has no arithmetic in bfloat16, and bitsandbytes no kernel for it
    peers = (PEER_PORTABLE,) if bench.isa else (PEER_FLOAT32, PEER_BFLOAT16, PEER_PORTABLE)
    contenders = bench.present((NF4, BFLOAT16, *peers))
    with bases.written(bench, model, "nf4") as folders:
        workers = {name: bench.start(name) for name in contenders}
        try:
            rounds = min(bench.rounds, writing.FEW_ROUNDS)
            how: dict[str, Any] = dict(seconds=0.5, rounds=rounds, agree=AGREE, workers=workers)
            times = bench.race("decode", contenders, model=model, tokens=1, **folders, **how)
            peaks = {name: worker.peak() for name, worker in workers.items()}
            reading = bench.race("decode", contenders, model=model, tokens=prompt, **folders, **how)
        finally:
            for worker in workers.values():
                worker.close()
    yield from decoding(bench, f"{model} decoding in NF4", times, peaks)
    what = f"{model} in NF4, a prompt of {prompt} tokens"
    speed = {name: prompt / reading.of(name).median for name in contenders}
    note = f"{speed[NF4]:.0f} tokens/s, {speed[BFLOAT16]:.0f} of our bfloat16"
    if (peer := faster_peer(reading)) is None:
        yield Row("decode", f"{what}: speed", "tokens/s", Spread.of([speed[NF4]]), None, "", note)
        return
    ratio = reading.speedup(of=NF4, over=peer)
    yield Row("decode", f"{what}: speed over transformers", "x", ratio, None, "", f"{note}, {of_peers(speed, 0)}")


def faster_peer(times: Times) -> str | None:
    return writing.fastest(times, [name for name in times.seconds if is_peer(name)])


def of_peers(speed: dict[str, float], digits: int) -> str:
    return ", ".join(f"{speed[name]:.{digits}f} of {words}" for name, words in NAMES.items() if name in speed)


def decoding(bench: Bench, what: str, times: Times, peaks: dict[str, int]) -> Iterator[Row]:
    speed = {name: 1 / times.of(name).median for name in times.seconds}
    details = {"tokens_per_second": speed, "peak_bytes": peaks, "seconds": times.seconds}
    if (peer := faster_peer(times)) is None:
        note = bench.torch_missing or ""
        yield Row("decode", f"{what}: speed", "tokens/s", Spread.of([speed[NF4]]), None, "", note, details)
    else:
        note = f"{speed[NF4]:.1f} tokens/s to {of_peers(speed, 2)}"
        ratio = times.speedup(of=NF4, over=peer)
        yield Row("decode", f"{what}: speed over transformers", "x", ratio, Target(">=", 30.0), "", note, details)
        name = f"{what}: speed over transformers where bitsandbytes has no kernel for it"
        yield Row("decode", name, "x", times.speedup(of=NF4, over=PEER_PORTABLE))
    note = f"{speed[NF4]:.1f} tokens/s to {speed[BFLOAT16]:.1f}"
    ratio = times.speedup(of=NF4, over=BFLOAT16)
    yield Row("decode", f"{what}: speed over our bfloat16", "x", ratio, Target(">", 1.0), "", note)
    others = ", ".join(f"{name} {peak / GB:.2f}" for name, peak in peaks.items() if name != NF4)
    memory = Spread.of([peaks[NF4] / GB])
    yield Row("decode", f"{what}: peak memory", "GB", memory, Target("<=", 1.2), "", f"whole process; {others}")
