"""`entrenar profile`: where the time of a training step goes, kernel by kernel, beside what the machine could do."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrenar.cli.configuration import add_config

if TYPE_CHECKING:
    from entrenar.observe.profile import Profile
    from entrenar.training.profiling import Step

NAME = "profile"
HELP = "say where the time of a training step goes, kernel by kernel"
EXAMPLE = """
entrenar profile examples/llama2/configs/15m.toml --picture roofline.png
entrenar profile --model.hidden_size 512 --training.batch_size 4 --sizes
"""
COPIED = 256 << 20  # bytes copied to measure the memory: more than most caches hold


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "entrenar profile [FILE.toml] [options] [--section.key VALUE ...]"
    parser.add_argument("file", metavar="FILE.toml", nargs="?", help="the configuration (default: that of train)")
    parser.add_argument("--steps", metavar="N", type=int, default=5, help="steps after the first (default 5)")
    parser.add_argument("--sizes", action="store_true", help="a line for each size a kernel was called with")
    parser.add_argument("--picture", metavar="FILE.png", type=Path, help="draw the kernels under the machine's roofs")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--force", action="store_true", help="start although the plan says memory will not do")
    add_config(parser)


def run(args: argparse.Namespace) -> int:
    """Profile a few steps, tell of the one in the middle. Raises CommandLineError before anything takes its time."""
    from entrenar import kernels
    from entrenar.cli.measure import memory_bandwidth
    from entrenar.cli.parser import CommandLineError
    from entrenar.files import write_file
    from entrenar.training import machine
    from entrenar.training.config import kind_of, read_config
    from entrenar.training.job import plan_of
    from entrenar.training.profiling import step_of

    if args.steps < 1:
        raise CommandLineError(f"--steps {args.steps}: wanted 1 or more")
    if args.file and args.config:
        raise CommandLineError(f"{args.file} and --config {args.config}: one configuration is wanted; leave one out")
    file = args.file or args.config
    config = read_config(file, args.overrides, kind_of(file, args.overrides))
    plan_of(config).accepted(None, force=args.force)
    here = machine.look()
    bandwidth = memory_bandwidth(kernels.get_num_threads(), 0.3, COPIED)
    step = step_of(config)
    profile = middle(step, args.steps)
    found = summary(step, profile, here, bandwidth, by_size=args.sizes)
    if args.picture:
        write_file(args.picture, picture(profile, found))
    print(json.dumps(found) if args.json else "\n".join(render(found)))
    return 0


def middle(step: Step, steps: int) -> Profile:
    """The step of median length, after a first one that warms up."""
    from entrenar.cli.bar import Progress

    profiles = []
    with Progress("steps", steps + 1) as progress:
        for number in range(steps + 1):
            profiles.append(step.run())
            progress(number + 1, steps + 1)
            if not sys.stderr.isatty():
                print(f"step {number + 1} of {steps + 1}: {profiles[-1].seconds:.3f} s", file=sys.stderr, flush=True)
    chosen = statistics.median_low(profile.seconds for profile in profiles[1:])
    return next(profile for profile in profiles[1:] if profile.seconds == chosen)


def summary(step: Step, profile: Profile, here: Any, bandwidth: float, *, by_size: bool) -> dict[str, Any]:
    """All that is told, in seconds, operations and bytes."""
    from entrenar.training import machine

    lines = profile.table(by_size=by_size)
    return {
        "machine": {"cpu": here.cpu, "threads": here.threads, "kernels": here.kernels, "peak_flops": here.peak_flops,
                    "bandwidth": bandwidth},
        "tokens": step.tokens,
        "parameters": step.model.config.parameter_count(),
        "seconds": profile.seconds,
        "outside": profile.outside,
        "flops": sum(line.flops for line in lines),
        "memory_peak": machine.memory_peak(),
        "kernels": [vars(line) for line in lines],
    }  # fmt: skip


def render(found: dict[str, Any]) -> list[str]:
    """The table for people."""
    from entrenar.cli.terminal import columns, paint
    from entrenar.training.display import size

    m, whole = found["machine"], found["seconds"]
    rows = [("kernel", "calls", "ms", "share", "GFLOP/s", "of peak", "GB/s", "of memory")]
    for line in found["kernels"]:
        seconds, name = line["seconds"], f"{line['kernel']} {line['sizes']}".strip()
        computed = _rate(line["flops"] / seconds, m["peak_flops"])
        moved = _rate(line["bytes"] / seconds, m["bandwidth"])
        rows.append((name, f"{line['calls']:,}", *_time(seconds, whole), *computed, *moved))
    rows.append(("outside kernels", "", *_time(found["outside"], whole), "", "", "", ""))
    rows.append(("the step", "", *_time(whole, whole), *_rate(found["flops"] / whole, m["peak_flops"]), "", ""))
    head, *body = columns(rows)
    return [
        f"{found['parameters']:,} parameters, {found['tokens']:,} tokens a step; {m['cpu']}, {m['threads']} threads, "
        f"{m['kernels']}",
        f"measured: {m['peak_flops'] / 1e9:.0f} GFLOP/s of multiply-adds, {m['bandwidth'] / 1e9:.0f} GB/s of copying",
        "",
        paint(head, "bold"),
        *body,
        "",
        f"{found['tokens'] / whole:,.0f} tokens/s; this process held {size(found['memory_peak'])} at most",
    ]


def _time(seconds: float, whole: float) -> tuple[str, str]:
    return f"{1e3 * seconds:,.1f}", f"{seconds / whole:.1%}"


def _rate(speed: float, roof: float) -> tuple[str, str]:
    return f"{speed / 1e9:.1f}", f"{speed / roof:.0%}"


def picture(profile: Profile, found: dict[str, Any]) -> bytes:
    from entrenar.training.roofline import Roofline, render

    m, lines = found["machine"], profile.table()
    subtitle = (
        f"{found['parameters'] / 1e6:,.0f}M parameters, {found['tokens']:,} tokens: {1e3 * profile.seconds:,.0f} ms, "
        f"{found['flops'] / profile.seconds / m['peak_flops']:.0%} of the peak; {m['cpu']}, {m['threads']} threads, "
        f"{m['kernels']}; area: share of the time"
    )
    title = "A training step under the machine's roofs"
    return render(Roofline(title, subtitle, m["peak_flops"], m["bandwidth"], lines))
