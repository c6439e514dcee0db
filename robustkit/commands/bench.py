"""`robustkit bench`: from the words of the command line to a finished folder, and to a verdict where one is asked for."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from rich.console import Console
from rich.text import Text

from robustkit.bench.comparison import gates
from robustkit.bench.comparison.gates import Verdict
from robustkit.bench.execution.executors import Executor, Processes, Serial
from robustkit.bench.execution.loaded_run import LoadedRun, load
from robustkit.bench.execution.preview import preview
from robustkit.bench.execution.runner import Outcome, outcomes
from robustkit.bench.folder import Folder, open_folder, results_of
from robustkit.bench.plan.plan import Plan
from robustkit.bench.plan.plan_file import read_plan
from robustkit.bench.plan.request import Request, plan_of
from robustkit.bench.reporting.junit import junit
from robustkit.bench.reporting.live import Live
from robustkit.bench.reporting.table import preview_table, table
from robustkit.bench.results import read_run as past
from robustkit.bench.results.read_run import Run
from robustkit.bench.results.record import worst_case
from robustkit.commands._output import write_output
from robustkit.errors import ArgumentError

__all__ = ["RunOptions", "bench_command"]

INTERRUPTED = 130


@final
@dataclass(frozen=True)
class RunOptions:
    """How a plan is run, shown and judged; nothing here changes a number.

    Attributes:
        out: Its folder; default a new one with the date.
        resume: Whether to go on with the run that is there.
        workers: How many processes do the work.
        fail_under: The least robust accuracy that passes, in [0, 1].
        baseline: The folder of a run to be compared with.
        fail_if_worse: By how much the robust accuracy may fall below that of the baseline.
        junit: A file for the verdicts, as continuous integration reads them.
        format: Whether the table or results.json goes to standard output.
        dry_run: Only tell what the run would take.
    """

    out: Path | None = None
    resume: bool = False
    workers: int = 1
    fail_under: float | None = None
    baseline: Path | None = None
    fail_if_worse: float | None = None
    junit: Path | None = None
    format: str = "text"
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.resume and self.out is None:
            raise ArgumentError("--resume needs --out DIR: the folder of the run that is to go on")
        if self.fail_if_worse is not None and self.baseline is None:
            raise ArgumentError(f"fail_if_worse={self.fail_if_worse} needs --baseline RUN: the run not to be worse than")
        if self.fail_under is not None and not 0 <= self.fail_under <= 1:
            raise ArgumentError(f"fail_under={self.fail_under:g} must lie in [0, 1]: write 0.9 for 90 %")
        if self.fail_if_worse is not None and not 0 <= self.fail_if_worse <= 1:
            raise ArgumentError(f"fail_if_worse={self.fail_if_worse:g} must lie in [0, 1]: write 0.01 for one point in 100")
        if self.format not in ("text", "json"):
            raise ArgumentError(f"format={self.format!r} must be text or json")

    @property
    def executor(self) -> Executor:
        """Who does the work."""
        return Serial() if self.workers == 1 else Processes(self.workers)


def bench_command(request: Request, manner: RunOptions) -> int:
    """Run, show, write and judge; the exit code comes back: 0 done, 1 a gate failed, 130 interrupted.

    Files are written after every block and every case, so that whatever stops a run leaves what was finished.
    """
    executor, screen = manner.executor, Console()
    plan = _plan(request, manner)
    baseline = _baseline(manner.baseline) if manner.baseline is not None else None
    if manner.junit is not None:
        _check_junit(manner.junit)
    with redirect_stdout(sys.stderr):  # what a model prints is not the answer
        loaded = load(plan)
    if manner.dry_run:
        screen.print(preview_table(preview(loaded), manner.workers))
        return 0
    _judged(_promised(loaded), baseline, manner)  # a gate that cannot be asked is refused now, and not after hours
    with open_folder(manner.out, loaded.plan, resume=manner.resume) as folder:
        try:
            folder.begin(loaded)
            with redirect_stdout(sys.stderr):
                results, run = _run(loaded, folder, executor, manner.workers)
        except OSError as error:
            raise ArgumentError(
                f"out={str(folder.path)!r} cannot be written ({error.strerror}); make room, and go on with --resume"
            ) from error
        except KeyboardInterrupt:
            again = shlex.join(["robustkit", "bench", "--out", str(folder.path), "--resume"])
            print(f"robustkit: what was finished is in {folder.path}; go on with: {again}", file=sys.stderr)
            return INTERRUPTED
        verdicts = _judged(run, baseline, manner)
        if manner.junit is not None:
            write_output("junit", manner.junit, junit(results, verdicts).encode("utf-8"))
        _show(screen, results, folder, verdicts, manner)
    return 0 if all(verdict.passed for verdict in verdicts) else 1


def _plan(request: Request, manner: RunOptions) -> Plan:
    """What to run; `--resume` without any other word means the plan of that folder."""
    if not manner.resume or manner.out is None or request.given():
        return plan_of(request)
    if not (manner.out / "plan.toml").is_file():
        raise ArgumentError(f"out={str(manner.out)!r} holds no plan.toml, so there is no run to go on with; say what to run")
    return read_plan(manner.out / "plan.toml")


def _run(loaded: LoadedRun, folder: Folder, executor: Executor, workers: int) -> tuple[dict[str, Any], Run]:
    done: list[Outcome] = []
    # On stderr, so that standard output holds the answer alone.
    with Live(Console(stderr=True), loaded, workers) as live:
        for outcome in outcomes(loaded, folder.store, executor, live.progress):
            done.append(outcome)
            results = folder.write(loaded, done)
    done.sort(key=lambda outcome: outcome.index)
    return results, Run(folder.path, results, tuple(outcome.robust for outcome in done))


def _baseline(path: Path) -> Run:
    """The run to be compared with; half of one would ask for less than it seems."""
    run = past.read(path)
    done, cases = len(run.results["records"]), run.results.get("cases", 0)
    if done < cases:
        raise ArgumentError(
            f"baseline={str(path)!r} has finished {done} of {cases} cases; go on with: robustkit bench --out {path} --resume"
        )
    return run


def _check_junit(path: Path) -> None:
    """Refuse now what could not be written when all is done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"junit={str(path)!r} cannot be written ({error.strerror}); name another file") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ArgumentError(f"junit={str(path)!r} cannot be written; name a file in a folder of yours")


def _promised(loaded: LoadedRun) -> Run:
    """The run as it will be, with figures that mean nothing yet."""
    plan = loaded.plan
    nobody = [np.zeros(len(loaded.images(case)), np.bool_) for case in range(len(loaded.trials))]
    records = [
        {
            **asdict(trial.case),
            "data": plan.data,
            "defence": trial.case.defended,
            "recipe": repr(trial.attack),
            "seed": plan.seed,
            "n": len(robust),
            "clean_accuracy": 0.0,
            "robust_accuracy": 0.0,
            "flags": [],
            "data_hash": plan.pins[plan.data],
        }
        for trial, robust in zip(loaded.trials, nobody, strict=True)
    ]
    results = results_of(loaded, []) | {"records": records, "worst_case": worst_case(list(zip(records, nobody, strict=True)))}
    return Run(Path("the run that is asked for"), results, tuple(nobody))


def _judged(run: Run, baseline: Run | None, manner: RunOptions) -> tuple[Verdict, ...]:
    verdicts: tuple[Verdict, ...] = ()
    if manner.fail_under is not None:
        verdicts += gates.fail_under(run.results, manner.fail_under)
    if baseline is not None:
        verdicts += gates.fail_if_worse(run, baseline, manner.fail_if_worse or 0.0)
    return verdicts


def _show(screen: Console, results: dict[str, Any], folder: Folder, verdicts: Sequence[Verdict], manner: RunOptions) -> None:
    if manner.format == "json":
        told = [{"name": verdict.name, "passed": verdict.passed, "why": verdict.why} for verdict in verdicts]
        sys.stdout.write(json.dumps(results | {"out": str(folder.path), "gates": told}, indent=1) + "\n")
        return
    screen.print(table(results["records"], results["worst_case"]))
    for verdict in verdicts:
        mark = ("passed", "green") if verdict.passed else ("FAILED", "bold red")
        screen.print(Text.assemble("gate ", mark, f" {verdict.name}: {verdict.why}"), soft_wrap=True)
    screen.print(Text(f"report: {folder.path / 'report.html'}"), soft_wrap=True)
