"""Search the fastest settings of a model's kernels on a device."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from slmtvm.cli.arguments import positive, threads

if TYPE_CHECKING:
    from slmtvm.tuning.tuner import Progress, TuneReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="the ONNX file")
    parser.add_argument(
        "--target", default="host", metavar="NAME",
        help="what to tune for: a name of `slmtvm targets`, a TOML file, or host (default)",
    )  # fmt: skip
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--local", action="store_true", help="measure on this machine (the default)")
    where.add_argument(
        "--tracker", metavar="HOST:PORT", help="measure on the devices of this tracker"
    )
    where.add_argument(
        "--static", action="store_true",
        help="measure nothing: rank settings by their code alone (by llvm-mca where it is "
        "installed), for a board that is not at hand; --trials are settings of each kernel",
    )  # fmt: skip
    parser.add_argument(
        "--key", metavar="K", help="which of the tracker's devices (default: the target's name)"
    )
    parser.add_argument(
        "--cluster", metavar="ray://HOST:PORT",
        help="a Ray cluster that builds what the tracker's devices measure",
    )  # fmt: skip
    parser.add_argument("--tls", type=Path, metavar="DIR", help="the tuner's keys")
    parser.add_argument(
        "--records", type=Path, required=True, metavar="FILE",
        help="where to append what is measured, for `slmtvm compile --records`",
    )  # fmt: skip
    parser.add_argument(
        "--trials", type=positive, metavar="N", help="settings to measure at most, of all kernels"
    )
    parser.add_argument(
        "--minutes", type=float, metavar="M",
        help="time to search at most (default: until nothing more is to be gained); whole models "
        "are compared after that",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action="store_true", help="do not measure again what the file holds"
    )
    parser.add_argument(
        "--start-from", type=Path, action="append", default=[], metavar="FILE",
        help="records of other models or devices, to learn from first; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=threads, default=1, help="threads that compute a kernel (default 1)"
    )
    parser.add_argument(
        "--static-filter", action="store_true",
        help="rank twice as many settings by their code as are measured: the worse half is not",
    )  # fmt: skip
    parser.add_argument(
        "--no-confirm", dest="confirm", action="store_false",
        help="do not compare whole models in the end: records then hold what kernels did alone",
    )  # fmt: skip
    parser.add_argument(
        "--turns", type=_turns, default=15, metavar="N",
        help="how often whole models are compared at most, at least 3 (default 15)",
    )  # fmt: skip
    parser.add_argument("--context", type=positive, help="as for `slmtvm compile`")
    parser.add_argument(
        "--kv", choices=("f16", "f32", "int8", "int4"), help="as for `slmtvm compile`"
    )
    parser.add_argument(
        "--activations", choices=("int8", "file", "f32"), default="int8",
        help="as for `slmtvm compile`",
    )  # fmt: skip


def _rank(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from slmtvm.tuning.ranking import SETTINGS, rank

    with tqdm(bar_format="{desc} [{elapsed}]", leave=False, disable=options.quiet or None) as bar:
        report = rank(
            options.model,
            options.target,
            records=options.records,
            settings=options.trials or SETTINGS,
            context=options.context,
            kv=options.kv,
            activations=options.activations,
            step=bar.set_description_str,
        )
    if not options.quiet:
        print(f"{options.records}: ranked by {report.by}, nothing was measured")
        print(f"  {'kernel':52} {'cost':>6} {'settings':>8}")
        for one in report.tasks:
            knobs = " ".join(f"{name}{value}" for name, value in sorted(one.knobs.items()))
            print(f"  {one.task.key.label:52} {one.ratio:6.3f} {one.settings:8}  {knobs}")
    return 0


def run(options: argparse.Namespace) -> int:
    if options.static:
        return _rank(options)
    from tqdm import tqdm

    from slmtvm.tuning.tune import tune

    with tqdm(
        bar_format="{desc} [{elapsed}]", leave=False, disable=options.quiet or None
    ) as bar:  # fmt: skip
        report = tune(
            options.model,
            options.target,
            records=options.records,
            trials=options.trials,
            minutes=options.minutes,
            resume=options.resume,
            start_from=options.start_from,
            threads=options.threads,
            tracker=options.tracker,
            key=options.key,
            tls=options.tls,
            confirm=options.confirm,
            cluster=options.cluster,
            static_filter=options.static_filter,
            turns=options.turns,
            context=options.context,
            kv=options.kv,
            activations=options.activations,
            step=bar.set_description_str,
            progress=lambda p: bar.set_description_str(_line(p, options)),
        )
    if not options.quiet:
        print(_summary(report, options.records))
    return 0


def _turns(text: str) -> int:
    value = positive(text)
    if value < 3:
        raise argparse.ArgumentTypeError("fewer than 3 turns say nothing")
    return value


def _line(progress: Progress, options: argparse.Namespace) -> str:
    left = []
    if options.trials:
        left.append(f"{options.trials - progress.trials} trials")
    if options.minutes:
        left.append(f"{max(0, options.minutes - progress.seconds / 60):.1f} minutes")
    return (
        f"{progress.trials} trials, {progress.gain:.3f} times as fast; {progress.task} "
        f"{1 / progress.best:.3f}{_percent(progress.of_limit)}"
        + (f"; {' or '.join(left)} left" if left else "")
    )


def _percent(of_limit: float | None) -> str:
    return "" if of_limit is None else f", {of_limit:.0%} of the limit"


def _summary(report: TuneReport, records: Path) -> str:
    lines = [
        f"{records}: {report.trials} settings measured, {report.failures} of them failed"
        + (", interrupted" if report.interrupted else ""),
        f"  the kernels together are {report.gain:.3f} times as fast as with default settings",
        f"  {'kernel':52} {'share':>6} {'speed':>6} {'limit':>6} {'trials':>7}",
    ]
    for task in report.tasks:
        knobs = " ".join(f"{name}{value}" for name, value in sorted(task.knobs.items()))
        lines.append(
            f"  {task.key.label:52} {task.share:6.1%} {1 / task.ratio:6.3f} "
            f"{'' if task.of_limit is None else format(task.of_limit, '.0%'):>6} "
            f"{task.trials:3}/{task.space:3}  {knobs}"
        )
    lines += [f"  {record}" for record in (*report.confirmations, *report.setups)]
    return "\n".join(lines)
