"""`robustkit bench` and `robustkit crosscheck`: from the words of the command line to a finished folder."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import final

from rich.console import Console
from rich.text import Text

from robustkit import data as real_data
from robustkit.bench import console, folder
from robustkit.bench.plan import Case, Plan, default_plan
from robustkit.bench.runner import Outcome, run
from robustkit.bench.subject import Subject
from robustkit.errors import ArgumentError
from robustkit.interop._peers import load_foolbox
from robustkit.interop.crosscheck import crosscheck, peers, table

__all__ = ["Request", "bench_command", "crosscheck_command", "plan_of"]


@final
@dataclass(frozen=True)
class Request:
    """The options of `robustkit bench` as they were given; None where one was not."""

    model: list[str] | None = None
    data: str | None = None
    limit: int | None = None
    offset: int = 0
    threat: list[str] | None = None
    attack: list[str] | None = None
    goal: list[str] | None = None
    seed: int = 0
    batch_size: int = 100
    device: str = "cpu"

    def command(self) -> str:
        """The words that ask for the same again, in a new folder."""
        words = ["robustkit", "bench"]
        for option in fields(self):
            value = getattr(self, option.name)
            for item in value if isinstance(value, list) else [] if value == option.default else [value]:
                words += ["--" + option.name.replace("_", "-"), str(item)]
        return shlex.join(words)


def plan_of(request: Request) -> Plan:
    """The plan of a request: the default one where no model is named, otherwise every combination of what is.

    Raises:
        ArgumentError: A model without data or threat.
    """
    default = default_plan()
    models = request.model or list(dict.fromkeys(case.model for case in default.cases))
    if request.model and (request.data is None or request.threat is None):
        missing = "--data" if request.data is None else "--threat"
        raise ArgumentError(
            f"{missing} is missing; say on what and against what, for example: "
            f"robustkit bench --model {models[0]} --data mnist-5k --threat linf:0.1"
        )
    threats = request.threat or list(dict.fromkeys(case.threat for case in default.cases))
    if request.attack or request.goal or request.model:
        pairs = [(attack, goal) for attack in request.attack or ["pgd"] for goal in request.goal or ["misclassify"]]
    else:
        pairs = list(dict.fromkeys((case.attack, case.goal) for case in default.cases))
    cases = [Case(model, threat, attack, goal) for model in models for threat in threats for attack, goal in pairs]
    return Plan(
        tuple(dict.fromkeys(cases)), default.data if request.data is None else request.data, request.offset, request.limit,
        request.seed, request.batch_size, request.device,
    )  # fmt: skip


def bench_command(request: Request, out: Path | None) -> None:
    """Run, show and write. Files are written after every case, so that an interrupted run leaves what was finished."""
    plan, screen = plan_of(request), Console()
    outcomes: list[Outcome] = []
    with folder.new_folder(out) as target:
        with console.live(screen) as bar:
            task = bar.add_task("preparing", total=None)

            def progress(case: Case, images: int, total: int) -> None:
                bar.update(task, description=f"{case.model} {case.threat} {case.attack}", advance=images, total=total)

            for outcome in run(plan, progress):
                outcomes.append(outcome)
                folder.write(target, outcomes, device=plan.device, command=request.command())
        screen.print(console.table(*folder.records_of(outcomes)))
        screen.print(Text(f"report: {target / 'report.html'}"), soft_wrap=True)


def crosscheck_command(model: str, data: str, limit: int) -> int:
    """Compare with the other installed libraries and print the table; 0 if all agree or are known not to, else 1.

    Raises:
        MissingExtraError: There is no library to compare with.
    """
    absent = [name for name, version in peers().items() if version is None]
    if len(absent) == len(peers()):
        load_foolbox()  # says how to install it
    plan = Plan((Case(model, "linf:0.1", "pgd"),), data, limit=limit)
    part = real_data.load(data).part(0, limit)
    rows, screen = crosscheck(Subject(model, part, plan).model, part.x, part.y), Console()
    screen.print(table(rows))
    if absent:
        screen.print(f"not installed, so not compared: {', '.join(absent)}", highlight=False)
    return 0 if all(row.ok for row in rows) else 1
