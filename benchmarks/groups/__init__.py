"""What is measured. One file per group, and in each: `rows(bench)`, a generator of report rows, run by the
driver; CONTENDERS, which build a case in a contender's process; and whatever else the driver asks one. (Without rows:
training.py, the step that several of them time; bases.py, what finetune.py, decode.py and generation.py start from;
writing.py, what the last two time; llama_cpp.py, a contender of generation.py.)

torch and entrenar are imported inside functions: each is there in one kind of process only.
"""

from benchmarks.groups import (
    attention,
    checkpointing,
    decode,
    default_run,
    engine,
    finetune,
    gemm,
    generation,
    growth,
    guard,
    install,
    ops,
    optimizer,
    packed,
    startup,
    step,
    threads,
)

GROUPS = {
    "gemm": gemm,
    "attention": attention,
    "ops": ops,
    "optimizer": optimizer,
    "step": step,
    "checkpointing": checkpointing,
    "engine": engine,
    "growth": growth,
    "threads": threads,
    "guard": guard,
    "startup": startup,
    "packed": packed,
    "finetune": finetune,
    "decode": decode,
    "generation": generation,
    "install": install,  # with --full
    "default_run": default_run,  # with --default-run
}
