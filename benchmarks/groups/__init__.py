"""What is measured. One file per group, and in each: `rows(bench)`, a generator of report rows, run by the
driver; CONTENDERS, which build a case in a contender's process; and whatever else the driver asks one.

torch and entrenar are imported inside functions: each is there in one kind of process only.
"""

from benchmarks.groups import default_run, engine, gemm, install, ops, startup, step

GROUPS = {
    "gemm": gemm,
    "step": step,
    "ops": ops,
    "startup": startup,
    "engine": engine,
    "install": install,  # with --full
    "default_run": default_run,  # with --default-run
}
