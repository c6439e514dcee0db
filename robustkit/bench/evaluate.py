"""The bench for Python: a plan, or objects in memory, and what came out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from robustkit.attack import Attack
from robustkit.bench.execution.executors import Executor, Processes, Serial
from robustkit.bench.execution.loaded_run import LoadedRun, ResolvedCase, load
from robustkit.bench.execution.model_under_test import Subject
from robustkit.bench.execution.runner import Outcome, outcomes
from robustkit.bench.folder import open_folder, results_of
from robustkit.bench.plan import specs
from robustkit.bench.plan.defence_specs import described
from robustkit.bench.plan.plan import NONE, Case, Plan
from robustkit.bench.reporting.live import Live
from robustkit.bench.reporting.notebook import fragment
from robustkit.bench.reporting.page import report
from robustkit.bench.reporting.table import table
from robustkit.bench.results.picture import Picture
from robustkit.bench.results.store import Store, replace_file
from robustkit.data import Data
from robustkit.errors import ArgumentError
from robustkit.target import Fn, Target
from robustkit.threats import Threat

__all__ = ["Report", "evaluate", "run"]

Model = Target | nn.Module | Fn
_BLOCK = 100  # images that are attacked at a time, unless a Target takes more at once


@final
@dataclass(frozen=True, eq=False)
class Report:
    """What a run came to; in a notebook it shows itself.

    Attributes:
        results: The content of results.json.
        pictures: Some of the attacked images.
    """

    results: dict[str, Any]
    pictures: tuple[Picture, ...] = ()

    @property
    def records(self) -> list[dict[str, Any]]:
        """A row for each case."""
        return list(self.results["records"])

    @property
    def worst_case(self) -> list[dict[str, Any]]:
        """For each model and threat, what survives all attacks: the figure to quote."""
        return list(self.results["worst_case"])

    def save(self, path: str | Path) -> None:
        """Write the page that shows all of it, one HTML file."""
        page = report(self.results, self.pictures, command=self.results["command"])
        replace_file(Path(path), page.encode("utf-8"))

    def __repr__(self) -> str:
        told = (
            f"{row['model']}, {row['threat']}: {row['clean_accuracy']:.1%} clean, {row['robust_accuracy']:.1%} robust at most "
            f"(95 % Wilson interval over the choice of {row['n']:,} images: {row['low']:.1%} to {row['high']:.1%})"
            for row in self.worst_case
        )
        return "\n".join(["Report", *told])

    def __rich__(self) -> Any:  # Any: what rich can print
        return table(self.records, self.worst_case)

    def _repr_html_(self) -> str:
        return fragment(self.results)


def run(plan: Plan, *, out: str | Path | None = None, resume: bool = False, workers: int = 1, progress: bool = False) -> Report:
    """Measure what a plan names.

    Args:
        plan: What to measure; `robustkit.bench.read_plan` reads one from a file.
        out: A folder to write the run to, as the command line does. Default: nothing is written.
        resume: Whether to go on with the run that is there.
        workers: How many processes share the work; a script that asks for several must keep its own work under
            `if __name__ == "__main__":`, since each of them imports it.
        progress: Whether to show a bar on a terminal.

    Returns:
        What came out.

    Raises:
        ArgumentError: Something in the plan means nothing, cannot be read, or cannot be done.
        MissingExtraError: An optional dependency is needed.
    """
    executor: Executor = Serial() if workers == 1 else Processes(workers)
    loaded = load(plan)
    if out is None:
        return _report(loaded, list(_outcomes(loaded, None, executor, workers, progress)))
    done: list[Outcome] = []
    with open_folder(Path(out), loaded.plan, resume=resume) as folder:
        folder.begin(loaded)
        for outcome in _outcomes(loaded, folder.store, executor, workers, progress):
            done.append(outcome)
            folder.write(loaded, done)
    return _report(loaded, done)


def evaluate(
    model: Model | Mapping[str, Model],
    data: Any,
    *,
    threat: Threat | str | Sequence[Threat | str],
    attacks: Attack | str | Sequence[Attack | str] = "pgd",
    goals: str | Sequence[str] = "misclassify",
    limit: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Measure how robust a model in memory is, or several.

    Args:
        model: Maps images (N, C, H, W) to logits (N, classes), with the normalisation inside (`robustkit.Normalize`): a
            module, a function, or a `Target`, which says how many images go through it at once and how a defence may be
            differentiated: `Quantise(8).guard(model)` is attacked along every view. Several as a dictionary:
            {"plain": a, "trained against PGD": b}.
        data: A pair of tensors or arrays (x, y), x inside the bounds of the threat and y whole numbers from 0; a DataLoader
            or anything else that yields pairs of tensors, which are put together in memory; or a `robustkit.data.Data`.
        threat: What may change, one or several: `Linf(8 / 255)`, or "linf:8/255".
        attacks: One or several: objects, or names as on the command line: `PGD(steps=100)`, "pgd:steps=100".
        goals: misclassify, least-likely, classify-as:K.
        limit: Take at most so many examples.
        seed: Of all noise.
        progress: Whether to show a bar on a terminal.

    Returns:
        What came out: a record for each model, threat, attack and goal, and what survives all attacks together.

    Raises:
        ArgumentError: Anything above that means nothing, or does not fit together.
    """
    models = dict(model) if isinstance(model, Mapping) else {_name(Target.of(model)): model}
    targets = {name: one if isinstance(one, Target) else Target(one, batch_size=_BLOCK) for name, one in models.items()}
    for name in targets:
        if not isinstance(name, str):
            raise ArgumentError(f'model: the name {name!r} must be a string: {{"plain": a, "robust": b}}')
    held = _data(data, limit)
    threats = [_meant("threat", one, Threat, specs.threat, specs.threat_words) for one in _several(threat)]
    meant = [_meant("attacks", one, Attack, specs.attack, repr) for one in _several(attacks)]
    goals = [_meant("goals", one, str, specs.goal, str)[0] for one in _several(goals)]
    behind = {name: described(target) or NONE for name, target in targets.items()}
    trials = [
        ResolvedCase(Case(name, told, word, goal, behind[name]), attack, one, specs.goal(goal))
        for name in targets
        for told, one in threats
        for word, attack in meant
        for goal in goals
    ]
    words = (
        f"robustkit.evaluate({', '.join(targets)}, {held.spec}, threat={threat!r}, attacks={attacks!r}, "
        f"goals={goals!r}, limit={limit}, seed={seed})"
    )
    loaded = _loaded(targets, held, trials, seed, words)
    return _report(loaded, list(_outcomes(loaded, None, Serial(), 1, progress)))


def _loaded(targets: Mapping[str, Target], held: Data, trials: Sequence[ResolvedCase], seed: int, words: str) -> LoadedRun:
    most = max((target.batch_size for target in targets.values()), default=_BLOCK)
    devices = {_device(target) for target in targets.values()}
    if len(devices) > 1:
        raise ArgumentError(f"the models are on {', '.join(sorted(map(str, devices)))}; bring them to one device")
    cases = tuple(trial.case for trial in trials)
    plan = Plan(
        cases,
        held.spec,
        seed=seed,
        block=max(_BLOCK, most),
        batch_size=most,
        device=str(next(iter(devices), "cpu")),
        threads=torch.get_num_threads(),
    )
    try:
        attacked = {case.subject: targets[case.model] for case in cases}
        subjects = {name: Subject(name, target, held, plan, weights=target.module) for name, target in attacked.items()}
    except Exception as error:
        error.add_note(
            f"robustkit had shown a model images of shape (N, {', '.join(map(str, held.shape[1:]))}), as they were given"
        )
        raise
    return LoadedRun(plan, held, subjects, trials, words)


def _outcomes(loaded: LoadedRun, store: Store | None, executor: Executor, workers: int, progress: bool) -> Iterator[Outcome]:
    if not progress:
        yield from outcomes(loaded, store, executor)
        return
    with Live(Console(stderr=True), loaded, workers) as live:
        yield from outcomes(loaded, store, executor, live.progress)


def _report(loaded: LoadedRun, done: Sequence[Outcome]) -> Report:
    pictures = (picture for outcome in sorted(done, key=lambda outcome: outcome.index) for picture in outcome.pictures)
    return Report(results_of(loaded, done), tuple(pictures))


def _several(given: Any) -> Sequence[Any]:
    """One thing, or several, as several."""
    return given if isinstance(given, list | tuple) else [given]


def _meant(name: str, given: Any, kind: type, read: Callable[[str], Any], words: Callable[[Any], str]) -> tuple[str, Any]:
    """The words for what was given, and what they mean."""
    if isinstance(given, str):
        return given, read(given)
    if not isinstance(given, kind):
        example = {"threat": "Linf(8 / 255)", "attacks": "PGD(steps=100)", "goals": '"misclassify"'}[name]
        raise ArgumentError(f"{name}={given!r} must be {example}, or a name as on the command line; several as a list")
    return words(given), given


def _data(given: Any, limit: int | None) -> Data:  # Any: what users have
    if isinstance(given, Data):
        return given.part(0, limit)
    pair = isinstance(given, tuple | list) and len(given) == 2 and all(isinstance(part, Tensor | np.ndarray) for part in given)
    x, y = map(torch.as_tensor, given) if pair else _together(given, limit)
    if x.shape[:1] != y.shape or not len(y) or y.dtype.is_floating_point or int(y.min()) < 0:
        raise ArgumentError(
            f"data: x has shape {tuple(x.shape)}, y is {y.dtype} of shape {tuple(y.shape)}; give images (N, C, H, W) and one "
            "label 0, 1, 2, ... for each"
        )
    x, y = x.detach().cpu(), y.detach().cpu().long()
    x = x.float() if x.dtype == torch.bfloat16 else x  # numpy, by which data are hashed, does not know it
    classes = tuple(str(label) for label in range(int(y.max()) + 1))
    return Data(x, y, classes, "(x, y)" if pair else type(given).__name__).part(0, limit)


def _together(loader: Iterable[Any], limit: int | None) -> tuple[Tensor, Tensor]:
    """The batches of a loader, as far as they are wanted."""
    xs, ys, n = [], [], 0
    try:
        for x, y in loader:
            xs.append(x)
            ys.append(y)
            n += len(y)
            if limit is not None and n >= limit:
                break
        return torch.cat(xs), torch.cat(ys)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"data={type(loader).__name__} does not yield pairs of tensors (x, y) that fit together ({error}); give two "
            "tensors, a DataLoader or a robustkit.data.Data"
        ) from error


def _name(target: Target) -> str:
    """The class of what is attacked, or the name of the function."""
    return str(getattr(target.fn, "__name__", type(target.fn).__name__))


def _device(target: Target) -> torch.device:
    parameters = target.module.parameters() if target.module is not None else iter(())
    return next((parameter.device for parameter in parameters), torch.device("cpu"))
