"""What a step of fine-tuning holds in memory, by arithmetic: from the shape of the model, before anything is made.

LoRA and QLoRA. Counts every array of a step at its fullest moment, by the order in which the engine takes and drops
them; full fine-tuning, whose gradients leave gaps that the C library does not fill, goes through training/rehearsal.py.
`memory_measure.py` says what a process really held. Leaves out the interpreter and libraries, which are measured.
"""

# B batch, T time, N = B T tokens, C channels, H heads, KH key/value heads, D head dim, F feed-forward, V vocabulary,
# L layers, r rank

from __future__ import annotations

from dataclasses import dataclass, replace

from entrenar.kernels.packed import Nested
from entrenar.llama import LlamaConfig
from entrenar.training import rehearsal
from entrenar.training.heap import Heap
from entrenar.training.plan import own_mapping
from entrenar.training.rehearsal import Rehearsal, scratch_floats

FLOAT = 4  # bytes
METHODS = ("full", "lora", "qlora")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")  # of LoRA
BLOCK = 64  # weights of NF4 that share a scale

SHAPES = {
    "124m": LlamaConfig(vocab_size=32000, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                        num_attention_heads=12),
    "1.1b": LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
                        num_attention_heads=32, num_key_value_heads=4),
    "7b": LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                      num_attention_heads=32),
}  # fmt: skip

WEIGHTS, ADAPTERS, GRADIENTS, MOMENTS = "weights", "adapters", "gradients", "AdamW's two moments"
ACTIVATIONS, BACKWARD, SCRATCH, PROGRAM = "activations", "backward, on its way", "scratch and tables", "program"
GAPS = "gaps between arrays"
PARTS = (WEIGHTS, ADAPTERS, GRADIENTS, MOMENTS, ACTIVATIONS, BACKWARD, SCRATCH, GAPS, PROGRAM)
# Where a rehearsal's arrays belong
REHEARSED = {
    rehearsal.WEIGHTS: WEIGHTS, rehearsal.GRADIENTS: GRADIENTS, rehearsal.MOMENTS: MOMENTS,
    rehearsal.LAYERS: ACTIVATIONS, rehearsal.INPUTS: ACTIVATIONS, rehearsal.BLOCK: ACTIVATIONS,
    rehearsal.HEAD: ACTIVATIONS, rehearsal.FORWARD: BACKWARD, rehearsal.BACKWARD: BACKWARD,
    rehearsal.SCRATCH: SCRATCH, rehearsal.ROPE: SCRATCH,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A step of fine-tuning.

    model   a name of SHAPES; the head is not tied to the embedding
    r       of the adapters on q, k, v and o; full fine-tuning has none
    """

    model: str
    method: str
    batch: int
    context: int
    r: int = 0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.model not in SHAPES or self.method not in METHODS or (self.r > 0) != (self.method != "full"):
            raise ValueError(f"{self}: wanted a model of {', '.join(SHAPES)}, a method of {', '.join(METHODS)}, "
                             "and r > 0 for adapters alone")  # fmt: skip

    @property
    def shape(self) -> LlamaConfig:
        return replace(SHAPES[self.model], max_position_embeddings=max(self.context, 256))

    @property
    def title(self) -> str:
        words = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}
        return f"{self.model} {words[self.method]}" + (f" r = {self.r}" if self.r else "")

    @property
    def detail(self) -> str:
        return f"{self.batch} x {self.context}" + (", checkpointing" if self.checkpointing else "")

    @property
    def name(self) -> str:
        return f"{self.title}, {self.detail}"


# ---- what is there before a step


def layer_matrices(shape: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(O, I) of each matrix of a block."""
    C, F, (H, KH, D) = shape.hidden_size, shape.intermediate_size, shape.heads
    return {"q_proj": (H * D, C), "k_proj": (KH * D, C), "v_proj": (KH * D, C), "o_proj": (C, H * D),
            "gate_proj": (F, C), "up_proj": (F, C), "down_proj": (C, F)}  # fmt: skip


def adapter_parameters(shape: LlamaConfig, r: int) -> int:
    """Of A (r, I) and B (O, r) beside every target of every block."""
    matrices = layer_matrices(shape)
    return shape.num_hidden_layers * sum(r * sum(matrices[name]) for name in TARGETS)


def trained(case: Case) -> int:
    return case.shape.parameter_count() if case.method == "full" else adapter_parameters(case.shape, case.r)


def reduction(case: Case) -> float:
    """By how many percent fewer weights are trained than there are, adapters included."""
    adapters = adapter_parameters(case.shape, case.r)
    return 100 * (1 - adapters / (case.shape.parameter_count() + adapters))


def nf4_bytes(rows: int, columns: int) -> int:
    """A nibble for each weight; for each 64 of them a scale in a byte; for each 256 scales a float; a table of 256."""
    size = rows * columns
    blocks = -(-size // BLOCK)
    return -(-size // 2) + blocks + FLOAT * (-(-blocks // Nested.block) + 256)


def weight_bytes(case: Case) -> int:
    """Of the base. QLoRA's: NF4 in the blocks, bfloat16 in embedding and head, float32 in the norms."""
    shape = case.shape
    C, V, L = shape.hidden_size, shape.vocab_size, shape.num_hidden_layers
    if case.method != "qlora":
        return FLOAT * shape.parameter_count()
    blocks = L * sum(nf4_bytes(*matrix) for matrix in layer_matrices(shape).values())
    return blocks + 2 * (2 * V * C) + FLOAT * (2 * L + 1) * C


def saved(case: Case) -> float:
    """By how many percent the base of QLoRA is smaller than that of LoRA, all of whose weights are float32."""
    return 100 * (1 - weight_bytes(replace(case, method="qlora")) / weight_bytes(replace(case, method="lora")))


# ---- what a step adds


def kept(case: Case) -> int:
    """Floats that a block keeps for its backward, its input among them, with adapters.

    The inputs of both norms and their rstd; q, k, v, the attention's output and logsumexp; gate and up; for the
    gradients of B each target's x A^T. A frozen weight keeps nothing, and what norms make is made again.
    """
    s, N = case.shape, case.batch * case.context
    C, F, (H, KH, D) = s.hidden_size, s.intermediate_size, s.heads
    always = 2 * C + 2 + 2 * H * D + 2 * KH * D + H + 2 * F
    return N * (always + len(TARGETS) * case.r)


def step_moments(case: Case, threads: int) -> list[dict[str, int]]:
    """Floats beyond weights and moments, by part, at the moments that may be the fullest: at the loss, in the backward
    of each block (its MLP's, when three arrays as wide as F are on their way), at the embedding."""
    s, N = case.shape, case.batch * case.context
    C, F, L = s.hidden_size, s.intermediate_size, s.num_hidden_layers
    block = trained(case) // L  # gradients of a block
    each = N * C if case.checkpointing else kept(case)
    again = kept(case) if case.checkpointing else 0  # of the block that is computed again, its output included

    # At the loss the last norm's input, output and the latter's gradient; and the kernels' scratch is exchanged for a
    # larger one, which is there before the former goes.
    former = max(scratch(case, threads)[:-2])
    moments = [{ACTIVATIONS: L * each + 3 * N * C + 2 * N, SCRATCH: former}]
    for i in reversed(range(L)):
        moments.append({ACTIVATIONS: (i + 1) * each + again, GRADIENTS: (L - 1 - i) * block,
                        BACKWARD: N * C + 3 * N * F})  # fmt: skip
    moments.append({GRADIENTS: trained(case), BACKWARD: N * C})
    return moments


def scratch(case: Case, threads: int) -> list[int]:
    """Floats of working memory that the kernels want; the last but one is the loss, the last comes after it."""
    s, N, B, T = case.shape, case.batch * case.context, case.batch, case.context
    (H, KH, D), C, F, V = s.heads, s.hidden_size, s.intermediate_size, s.vocab_size
    wanted = [scratch_floats("matmul", threads), scratch_floats("norm", N, C),
              scratch_floats("attention_forward", threads, B, T, T, H, KH, D)]  # fmt: skip
    if case.method == "qlora":
        wanted += [scratch_floats("packed_linear", threads, N, inputs) for inputs in (C, F)]
    return [*wanted, scratch_floats("linear_cross_entropy", threads, N, C, V),
            scratch_floats("attention_backward", threads, B, T, T, H, KH, D)]  # fmt: skip


def arithmetic(case: Case, *, threads: int, program: int = 0) -> dict[str, int]:
    """Bytes of each part at the fullest moment of a step; their sum is the peak.

    program   what the process holds beside the arrays: measured
    """
    parts = rehearsed(case, threads) if case.method == "full" else with_adapters(case, threads)
    return dict.fromkeys(PARTS, 0) | parts | {PROGRAM: program}


def rehearsed(case: Case, threads: int) -> dict[str, int]:
    """Full fine-tuning, gone through array by array."""
    arrays = Rehearsal(case.shape, case.batch, case.context, 1, case.checkpointing, threads, Heap(own_mapping()))
    heap = arrays.run(picture=False)
    parts = dict.fromkeys(PARTS, 0)
    for name, size in heap.at_peak.items():
        parts[REHEARSED[name]] += size
    return parts | {GAPS: heap.peak - sum(heap.at_peak.values())}


def with_adapters(case: Case, threads: int) -> dict[str, int]:
    fullest = max(step_moments(case, threads), key=lambda parts: sum(parts.values()))
    tables = case.shape.max_position_embeddings * case.shape.heads[2]
    parts = {name: FLOAT * floats for name, floats in fullest.items()}
    parts |= {WEIGHTS: weight_bytes(case), ADAPTERS: FLOAT * trained(case), MOMENTS: 2 * FLOAT * trained(case)}
    parts[SCRATCH] = parts.get(SCRATCH, 0) + FLOAT * (tables + max(scratch(case, threads)))
    return parts
