"""Reading a prompt and writing a text: by entrenar, by transformers, and, the larger model, by llama.cpp.

One base, a folder of bfloat16 with random weights: entrenar holds it as it is, or in NF4; transformers as float32 and
as bfloat16, of which the faster counts; llama.cpp has it from entrenar's export, as BF16, and from there in F16 and
Q4_0 by its own program. Logits after the prompt must agree, as far as the formats can. Decoding waits for memory:
beside it stands the share of what can be read, of the bytes of the weights that every token needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks.driver import Agreement, Bench, Times
from benchmarks.groups import bases, llama_cpp, machine, writing
from benchmarks.protocol import Case
from benchmarks.report import Row, Target
from benchmarks.spread import Spread

PROMPT = 256  # tokens
DECODING = 1.5  # seconds a round: the slowest, at 8 tokens/s, writes 36 tokens in three
TOLERANCE_INT16 = 1e-3
TOLERANCE_4_BITS = 0.05  # of the logits' length alone: see same_length

BFLOAT16, NF4, ARITHMETIC = "entrenar-bfloat16", "entrenar-nf4", "entrenar-bfloat16-arithmetic"
INT16 = "entrenar-nf4-int16"  # as `entrenar generate` writes with weights in 4 bits
TORCH_FLOAT32, TORCH_BFLOAT16 = "torch-float32", "torch-bfloat16"
LLAMA_BF16, LLAMA_F16, LLAMA_Q4_0 = "llama-bf16", "llama-f16", "llama-q4_0"
MEMORY = "memory"  # what can be read, of which decoding has a share: it takes turns with the others
TORCH, LLAMA = (TORCH_FLOAT32, TORCH_BFLOAT16), (LLAMA_BF16, LLAMA_F16, LLAMA_Q4_0)
NAMES = {
    BFLOAT16: "ours in bfloat16",
    NF4: "ours in NF4",
    INT16: "ours in NF4, int16",
    ARITHMETIC: "ours computing in bfloat16",
    TORCH_FLOAT32: "transformers in float32",
    TORCH_BFLOAT16: "transformers in bfloat16",
    LLAMA_BF16: "llama.cpp in BF16",
    LLAMA_F16: "llama.cpp in F16",
    LLAMA_Q4_0: "llama.cpp in Q4_0",
}


# -- contenders: a model is loaded once, for writing and for reading


@cache
def our_model(contender: str, base: str) -> Any:
    from entrenar import kernels
    from entrenar.llama import Llama

    kernels.keep_freed_memory()
    how: dict[str, Any] = {ARITHMETIC: {"compute": "bfloat16"}, INT16: {"compute": "int16"}}.get(contender, {})
    return Llama.from_pretrained(base, storage="nf4" if contender in (NF4, INT16) else "stored", **how)


def check_int16(llama: Any, few: Any) -> None:
    """Logits after a few tokens must be float32's, which is what a model computes while it is recorded."""
    from benchmarks.arrays import agree, fingerprint
    from entrenar.tensor import no_grad

    plain = llama(few[None])
    with no_grad():
        fixed = llama(few[None])
    plain, fixed = (x.data[0, -1] for x in (plain, fixed))
    assert plain.tobytes() != fixed.tobytes()
    if not agree(fingerprint(plain), fingerprint(fixed), tolerance=TOLERANCE_INT16):
        raise ValueError("logits in int16 are not those of float32")


@cache
def torch_model(compute: str, base: str) -> Any:
    return bases.torch_model(base, compute, compute).eval()


def with_entrenar(contender: str, model: str, tokens: int, base: str, files: dict[str, str]) -> Case:
    llama, prompt = our_model(contender, base), writing.prompt_of(model, tokens)
    if contender == INT16:
        check_int16(llama, prompt[:4])
    return writing.ours(llama, prompt, tokens)


def with_torch(compute: str, model: str, tokens: int, base: str, files: dict[str, str]) -> Case:
    return writing.of_torch(torch_model(compute, base), writing.prompt_of(model, tokens), tokens)


def with_llama_cpp(contender: str, model: str, tokens: int, base: str, files: dict[str, str]) -> Case:
    return llama_cpp.writing(files[contender], writing.prompt_of(model, tokens), tokens, writing.LONGEST)


CONTENDERS = {
    **{name: partial(with_entrenar, name) for name in (BFLOAT16, NF4, INT16, ARITHMETIC)},
    TORCH_FLOAT32: partial(with_torch, "float32"),
    TORCH_BFLOAT16: partial(with_torch, "bfloat16"),
    **{name: partial(with_llama_cpp, name) for name in LLAMA},
    MEMORY: machine.summing,
}


def bytes_a_token(contender: str, base: str) -> int:
    """Of weights, that are read for every token: all but an embedding, of which a row is."""
    llama = our_model(contender, base)
    weights = [*llama.named_packed(), *((name, tensor.data) for name, tensor in llama.named_parameters())]
    untied = not llama.config.tie_word_embeddings
    return sum(weight.nbytes for name, weight in weights if not (untied and name == "model.embed_tokens.weight"))


def flops_per_token(model: str, context: int) -> int:
    from entrenar.llama import LlamaConfig

    return LlamaConfig(**bases.MODELS[model]).flops_per_token(context, training=False)


# -- the driver's side


def same_length(a: list[float], b: list[float]) -> bool:
    """Of models in 4 bits. Random weights lose much by them, layer after layer: after 22 layers our NF4's logits are
    off by 0.6 of their length. That NF4 computes what it should is for decode.py to check.
    """
    return len(a) == len(b) and abs(a[0] - b[0]) <= TOLERANCE_4_BITS * max(a[0], b[0])


AGREE: dict[str, Agreement] = {
    **dict.fromkeys((ARITHMETIC, *TORCH, LLAMA_BF16, LLAMA_F16), partial(writing.within, writing.TOLERANCE_BFLOAT16)),
    **dict.fromkeys((NF4, INT16, LLAMA_Q4_0), same_length),
}


@dataclass
class Measured:
    bench: Bench
    model: str
    writing: Times
    reading: Times
    peaks: dict[str, int]
    weights: dict[str, int]  # bytes a token, of ours
    flops: int  # of a token of the prompt

    def writes(self, name: str) -> float:
        """Tokens a second."""
        return 1 / self.writing.of(name).median

    def reads(self, name: str) -> float:
        return PROMPT / self.reading.of(name).median

    def shares(self, name: str) -> Spread:
        """Bytes of weights a second, over those that were read in the same rounds."""
        both = zip(self.writing.seconds[name], self.writing.seconds[MEMORY], strict=True)
        return Spread.of((self.weights[name] / ours) / (machine.READ / memory) for ours, memory in both)

    def bandwidth_share(self, name: str) -> str:
        read = machine.READ / self.writing.of(MEMORY).median
        return f"{self.shares(name).median:.0%} of reading {read / 1e9:.1f} GB/s"

    def peak_share(self, name: str) -> str:
        return self.bench.share_of_peak(self.flops * self.reads(name))


def rows(bench: Bench, models: Sequence[str] = ("124m", "1.1b")) -> Iterator[Row]:
    for model in models:
        measured = race(bench, model, llama=model == "1.1b")
        yield from against_transformers(measured)
        yield row_of_bandwidth(measured)
        if model == "1.1b":
            yield from against_llama_cpp(measured)


def race(bench: Bench, model: str, *, llama: bool) -> Measured:
    ours = [BFLOAT16, *[NF4, INT16] * llama]
    if not bench.isa and bench.worker("entrenar").call("finetune", "computes_bfloat16"):
        ours.append(ARITHMETIC)
    contenders = bench.present((*ours, *TORCH, *LLAMA * llama))
    how: dict[str, Any] = dict(rounds=min(bench.rounds, writing.FEW_ROUNDS), agree=AGREE, model=model)
    with bases.written(bench, model, "bfloat16") as folders:
        base = folders["base"]
        files = gguf_files(bench, base, [name for name in contenders if name in LLAMA])
        with bench.apart([*contenders, MEMORY]) as workers:
            how |= {"workers": workers, "base": base, "files": files}
            decoding = bench.race("generation", [*contenders, MEMORY], tokens=1, seconds=DECODING, **how)
            peaks = {name: workers[name].peak() for name in contenders}
            # A prompt has too many rows for int16. Held to AVX2, PyTorch has no arithmetic in bfloat16: one takes it
            # nearly twice as long as in float32
            left_out = (INT16, TORCH_BFLOAT16) if bench.isa else (INT16,)
            readers = [name for name in contenders if name not in left_out]
            reading = bench.race("generation", readers, tokens=PROMPT, seconds=0.5, **how)
            weights = {name: workers[name].call("generation", "bytes_a_token", contender=name, base=base)
                       for name in ours}  # fmt: skip
    flops = bench.worker("entrenar").call("generation", "flops_per_token", model=model, context=PROMPT)
    return Measured(bench, model, decoding, reading, peaks, weights, flops)


def gguf_files(bench: Bench, base: str, contenders: Sequence[str]) -> dict[str, str]:
    """llama.cpp's contenders and their files, which lie beside the base and go with it."""
    if not contenders:
        return {}
    files = {name: str(Path(base).parent / f"{name}.gguf") for name in LLAMA}
    with bench.apart(("entrenar", "torch")) as workers:
        workers["entrenar"].call("llama_cpp", "write_gguf", base=base, path=files[LLAMA_BF16])
        for name in (LLAMA_F16, LLAMA_Q4_0):
            workers["torch"].call("llama_cpp", "quantize", source=files[LLAMA_BF16], path=files[name],
                                  kind=name.removeprefix("llama-"), threads=bench.threads)  # fmt: skip
    return files


def words(speeds: dict[str, float]) -> str:
    return ", ".join(f"{speed:.3g} of {NAMES[name]}" for name, speed in speeds.items())


def compared(times: Times, tokens: int, ours: Sequence[str], peers: Sequence[str]) -> str:
    return "tokens/s: " + words({n: tokens / times.of(n).median for n in (*ours, *peers) if n in times.seconds})


def against(name: str, times: Times, tokens: int, ours: str, peers: Sequence[str], target: Target | None, share: str,
            missing: str | None, details: dict[str, Any] | None = None) -> Row:  # fmt: skip
    """Our speed over the fastest of the peers; without any, ours alone."""
    note = compared(times, tokens, [ours], peers)
    if (peer := writing.fastest(times, peers)) is None:
        return Row("generation", name, "x", None, target, share, f"{missing}; {note}", details or {})
    return Row("generation", name, "x", times.speedup(of=ours, over=peer), target, share, note, details or {})


def against_transformers(m: Measured) -> Iterator[Row]:
    missing = m.bench.torch_missing
    name = f"{m.model} in bfloat16, a prompt of {PROMPT} tokens: speed over transformers"
    details = {"seconds": m.reading.seconds}
    yield against(name, m.reading, PROMPT, BFLOAT16, TORCH, Target(">=", 1.4), m.peak_share(BFLOAT16), missing, details)
    if ARITHMETIC in m.reading.seconds:
        name = f"{m.model}, a prompt of {PROMPT} tokens, computing in bfloat16: speed over transformers"
        yield against(name, m.reading, PROMPT, ARITHMETIC, TORCH, Target(">=", 1.0), "", missing)
    name = f"{m.model} in bfloat16, decoding: speed over transformers"
    details = {"seconds": m.writing.seconds, "peak_bytes": m.peaks}
    yield against(name, m.writing, 1, BFLOAT16, TORCH, Target(">=", 3.0), m.bandwidth_share(BFLOAT16), missing, details)


def row_of_bandwidth(m: Measured) -> Row:
    note = f"{m.weights[BFLOAT16] / 1e9:.2f} GB of weights a token, {m.writes(BFLOAT16):.3g} tokens/s"
    return Row("generation", f"{m.model} in bfloat16, decoding: bytes of weights a second, over what can be read", "x",
               m.shares(BFLOAT16), Target(">=", 0.75), m.bandwidth_share(BFLOAT16), note)  # fmt: skip


def against_llama_cpp(m: Measured) -> Iterator[Row]:
    missing, model = m.bench.llama_missing, m.model
    yield against(f"{model} in bfloat16, decoding: speed over llama.cpp's BF16", m.writing, 1, BFLOAT16, (LLAMA_BF16,),
                  Target(">=", 1.15), m.bandwidth_share(BFLOAT16), missing)  # fmt: skip
    yield against(f"{model} in NF4, int16, decoding: speed over llama.cpp's Q4_0", m.writing, 1, INT16, (LLAMA_Q4_0,),
                  Target(">=", 0.7), m.bandwidth_share(INT16), missing)  # fmt: skip
    yield against(f"{model} in NF4, decoding: speed over llama.cpp's Q4_0", m.writing, 1, NF4, (LLAMA_Q4_0,),
                  None, m.bandwidth_share(NF4), missing)  # fmt: skip
    ours = writing.fastest(m.reading, [name for name in (BFLOAT16, NF4) if name in m.reading.seconds])
    assert ours is not None
    yield against(f"{model}, a prompt of {PROMPT} tokens: speed over llama.cpp's best", m.reading, PROMPT, ours, LLAMA,
                  Target(">=", 1.0), m.peak_share(ours), missing)  # fmt: skip
    peaks = ", ".join(f"{peak / 1e9:.2f} of {NAMES[name]}" for name, peak in m.peaks.items() if name != BFLOAT16)
    yield Row("generation", f"{model} in bfloat16, decoding: peak memory", "GB", Spread.of([m.peaks[BFLOAT16] / 1e9]),
              None, "", f"whole process; {peaks}")  # fmt: skip
