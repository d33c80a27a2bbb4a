"""What is measured. One file per group, and in each: `rows(bench)`, a generator of report rows, run by the
driver; CONTENDERS, which build a case in a contender's process; and whatever else the driver asks one. (bases.py has
no rows: it is what finetune.py and decode.py start from.)

torch and entrenar are imported inside functions: each is there in one kind of process only.
"""

from benchmarks.groups import (
    attention,
    decode,
    default_run,
    engine,
    finetune,
    gemm,
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
    "engine": engine,
    "growth": growth,
    "threads": threads,
    "guard": guard,
    "startup": startup,
    "packed": packed,
    "finetune": finetune,
    "decode": decode,
    "install": install,  # with --full
    "default_run": default_run,  # with --default-run
}
