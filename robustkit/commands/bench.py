"""`robustkit bench`: run a plan, write its folder, and check the gates."""

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
from robustkit.bench.plan.plan import Plan
from robustkit.bench.plan.plan_file import read_plan
from robustkit.bench.plan.request import Request, plan_of
from robustkit.bench.reporting.junit import junit
from robustkit.bench.reporting.live import Live
from robustkit.bench.reporting.table import preview_table, table
from robustkit.bench.results.read_run import Run, read
from robustkit.bench.results.record import worst_case
from robustkit.bench.run_folder import Folder, open_folder, results_of
from robustkit.commands._output import write_output
from robustkit.errors import ArgumentError

__all__ = ["RunOptions", "bench_command"]

INTERRUPTED = 130


@final
@dataclass(frozen=True)
class RunOptions:
    """How a plan is run, shown and gated; nothing here changes a number.

    Attributes:
        out: The folder; by default a new one named by date and time.
        resume: Resume the run in this folder.
        workers: Number of processes.
        fail_under: The lowest robust accuracy that passes, in [0, 1].
        baseline: The folder of a run to compare with.
        fail_if_worse: The largest allowed fall of robust accuracy below the baseline, in [0, 1].
        junit: A JUnit XML file for the verdicts.
        format: Print the table ("text") or results.json ("json").
        dry_run: Only estimate the cost of the run.
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
            raise ArgumentError("--resume needs --out DIR: the folder of the run to resume")
        if self.fail_if_worse is not None and self.baseline is None:
            raise ArgumentError(f"fail_if_worse={self.fail_if_worse} needs --baseline RUN: the run to compare with")
        if self.fail_under is not None and not 0 <= self.fail_under <= 1:
            raise ArgumentError(f"fail_under={self.fail_under:g} must lie in [0, 1]: write 0.9 for 90 %")
        if self.fail_if_worse is not None and not 0 <= self.fail_if_worse <= 1:
            raise ArgumentError(f"fail_if_worse={self.fail_if_worse:g} must lie in [0, 1]: write 0.01 for one point in 100")
        if self.format not in ("text", "json"):
            raise ArgumentError(f"format={self.format!r} must be text or json")

    @property
    def executor(self) -> Executor:
        """This process, or several worker processes."""
        return Serial() if self.workers == 1 else Processes(self.workers)


def bench_command(request: Request, options: RunOptions) -> int:
    """Run the plan and write the results; returns the exit code: 0 done, 1 a gate failed, 130 interrupted.

    Files are written after every block and every case, so an interrupted run loses only unfinished blocks.
    """
    executor, screen = options.executor, Console()
    plan = _plan(request, options)
    baseline = _baseline(options.baseline) if options.baseline is not None else None
    if options.junit is not None:
        _check_junit(options.junit)
    with redirect_stdout(sys.stderr):  # a model may print; standard output is for the results
        loaded = load(plan)
    if options.dry_run:
        screen.print(preview_table(preview(loaded), options.workers))
        return 0
    _verdicts(_placeholder(loaded), baseline, options)  # an invalid gate is refused now, not after hours
    with open_folder(options.out, loaded.plan, resume=options.resume) as folder:
        try:
            folder.begin(loaded)
            with redirect_stdout(sys.stderr):
                results, run = _run(loaded, folder, executor, options.workers)
        except OSError as error:
            raise ArgumentError(
                f"out={str(folder.path)!r} cannot be written ({error.strerror}); make room, and continue with --resume"
            ) from error
        except KeyboardInterrupt:
            command = shlex.join(["robustkit", "bench", "--out", str(folder.path), "--resume"])
            print(f"robustkit: finished blocks are in {folder.path}; continue with: {command}", file=sys.stderr)
            return INTERRUPTED
        verdicts = _verdicts(run, baseline, options)
        if options.junit is not None:
            write_output("junit", options.junit, junit(results, verdicts).encode("utf-8"))
        _show(screen, results, folder, verdicts, options)
    return 0 if all(verdict.passed for verdict in verdicts) else 1


def _plan(request: Request, options: RunOptions) -> Plan:
    """The plan to run; `--resume` without further options takes the plan of the folder."""
    if not options.resume or options.out is None or request.given():
        return plan_of(request)
    if not (options.out / "plan.toml").is_file():
        raise ArgumentError(
            f"out={str(options.out)!r} has no plan.toml, so there is no run to resume; give the options of a new run"
        )
    return read_plan(options.out / "plan.toml")


def _run(loaded: LoadedRun, folder: Folder, executor: Executor, workers: int) -> tuple[dict[str, Any], Run]:
    done: list[Outcome] = []
    # Progress goes to stderr; standard output is for the results.
    with Live(Console(stderr=True), loaded, workers) as live:
        for outcome in outcomes(loaded, folder.store, executor, live.progress):
            done.append(outcome)
            results = folder.write(loaded, done)
    done.sort(key=lambda outcome: outcome.index)
    return results, Run(folder.path, results, tuple(outcome.robust for outcome in done))


def _baseline(path: Path) -> Run:
    """The finished run to compare with; a gate on an unfinished baseline would check less than it seems."""
    run = read(path)
    done, cases = len(run.results["records"]), run.results.get("cases", 0)
    if done < cases:
        raise ArgumentError(
            f"baseline={str(path)!r} has finished {done} of {cases} cases; continue it with: "
            f"robustkit bench --out {path} --resume"
        )
    return run


def _check_junit(path: Path) -> None:
    """Refuse a file that could not be written at the end."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"junit={str(path)!r} cannot be written ({error.strerror}); name another file") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ArgumentError(f"junit={str(path)!r} cannot be written; name a file in a folder that you may write to")


def _placeholder(loaded: LoadedRun) -> Run:
    """The run with the right cases and meaningless figures, to check gates against."""
    plan = loaded.plan
    robust = [np.zeros(len(loaded.images(case)), np.bool_) for case in range(len(loaded.cases))]
    records = [
        {
            **asdict(resolved.case),
            "data": plan.data,
            "defence": resolved.case.defence_or_none,
            "recipe": repr(resolved.attack),
            "seed": plan.seed,
            "n": len(images),
            "clean_accuracy": 0.0,
            "robust_accuracy": 0.0,
            "flags": [],
            "data_hash": plan.expected_hashes[plan.data],
        }
        for resolved, images in zip(loaded.cases, robust, strict=True)
    ]
    results = results_of(loaded, []) | {"records": records, "worst_case": worst_case(list(zip(records, robust, strict=True)))}
    return Run(Path("the run that is asked for"), results, tuple(robust))


def _verdicts(run: Run, baseline: Run | None, options: RunOptions) -> tuple[Verdict, ...]:
    verdicts: tuple[Verdict, ...] = ()
    if options.fail_under is not None:
        verdicts += gates.fail_under(run.results, options.fail_under)
    if baseline is not None:
        verdicts += gates.fail_if_worse(run, baseline, options.fail_if_worse or 0.0)
    return verdicts


def _show(screen: Console, results: dict[str, Any], folder: Folder, verdicts: Sequence[Verdict], options: RunOptions) -> None:
    if options.format == "json":
        gate_rows = [{"name": verdict.name, "passed": verdict.passed, "why": verdict.why} for verdict in verdicts]
        sys.stdout.write(json.dumps(results | {"out": str(folder.path), "gates": gate_rows}, indent=1) + "\n")
        return
    screen.print(table(results["records"], results["worst_case"]))
    for verdict in verdicts:
        mark = ("passed", "green") if verdict.passed else ("FAILED", "bold red")
        screen.print(Text.assemble("gate ", mark, f" {verdict.name}: {verdict.why}"), soft_wrap=True)
    screen.print(Text(f"report: {folder.path / 'report.html'}"), soft_wrap=True)
