"""Benchmarks: entrenar against NumPy, PyTorch, transformers, llama.cpp and others, on this machine, in one run.

    make bench                                   all but the slow groups, under half an hour
    python -m benchmarks --only gemm,step        some groups
    python -m benchmarks --default-run --full    the slow ones too

In reading order: protocol.py (how the driver and a contender's process speak), worker.py (such a process),
driver.py (who is measured when, and what is refused), spread.py (medians of ratios), arrays.py (equal inputs,
comparable results), groups/ (what is measured: one file per group, our side and theirs next to each other),
report.py (rows, JSON, the table in docs/benchmarks.md), __main__.py (the command line).
gemm_ladder/ stands alone: it measures the rungs of docs/kernels.md.
"""
