"""The bench for Python: run a plan, or evaluate models in memory."""

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
from robustkit.bench.execution.loaded_run import LoadedRun, load
from robustkit.bench.execution.model_under_test import ModelUnderTest
from robustkit.bench.execution.resolved_case import ResolvedCase
from robustkit.bench.execution.runner import Outcome, outcomes
from robustkit.bench.plan import specs
from robustkit.bench.plan.defence_specs import defence_recipe
from robustkit.bench.plan.plan import NONE, Case, Plan
from robustkit.bench.reporting.live import Live
from robustkit.bench.reporting.notebook import fragment
from robustkit.bench.reporting.page import report
from robustkit.bench.reporting.table import table
from robustkit.bench.results.picture import Picture
from robustkit.bench.results.store import Store, replace_file
from robustkit.bench.run_folder import open_folder, results_of
from robustkit.data import Data
from robustkit.errors import ArgumentError
from robustkit.target import Fn, Target
from robustkit.threats import Threat

__all__ = ["Report", "evaluate", "run"]

Model = Target | nn.Module | Fn
_BLOCK = 100  # images per block, unless a Target has a larger batch size


@final
@dataclass(frozen=True, eq=False)
class Report:
    """The results of a run; a notebook displays it as a table.

    Attributes:
        results: The content of results.json.
        pictures: Some of the attacked images.
    """

    results: dict[str, Any]
    pictures: tuple[Picture, ...] = ()

    @property
    def records(self) -> list[dict[str, Any]]:
        """One record per case."""
        return list(self.results["records"])

    @property
    def worst_case(self) -> list[dict[str, Any]]:
        """The robust accuracy under the union of all attacks, for each model and threat: the figure to report."""
        return list(self.results["worst_case"])

    def save(self, path: str | Path) -> None:
        """Write the report, one HTML file."""
        page = report(self.results, self.pictures, command=self.results["command"])
        replace_file(Path(path), page.encode("utf-8"))

    def __repr__(self) -> str:
        lines = (
            f"{row['model']}, {row['threat']}: {row['clean_accuracy']:.1%} clean, {row['robust_accuracy']:.1%} robust at most "
            f"(95 % Wilson interval over the choice of {row['n']:,} images: {row['low']:.1%} to {row['high']:.1%})"
            for row in self.worst_case
        )
        return "\n".join(["Report", *lines])

    def __rich__(self) -> Any:  # Any: a rich renderable
        return table(self.records, self.worst_case)

    def _repr_html_(self) -> str:
        return fragment(self.results)


def run(plan: Plan, *, out: str | Path | None = None, resume: bool = False, workers: int = 1, progress: bool = False) -> Report:
    """Run a plan.

    Args:
        plan: The plan; `robustkit.bench.read_plan` reads one from a file.
        out: A folder for the run, as on the command line. By default nothing is written.
        resume: Resume the run in this folder.
        workers: Number of processes. With more than one, a script must keep its own work under
            `if __name__ == "__main__":`, because each process imports the script.
        progress: Show a progress bar on a terminal.

    Returns:
        The results.

    Raises:
        ArgumentError: The plan is invalid, or names something that cannot be read or run.
        MissingExtraError: An optional dependency is missing.
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
    """Evaluate the robustness of one or several models in memory.

    Args:
        model: Maps images (N, C, H, W) to logits (N, classes), with the normalisation inside (`robustkit.Normalize`): a
            module, a function, or a `Target`, which states the batch size and how a defence may be differentiated;
            `Quantise(8).guard(model)` is attacked through every view. Several models as a dictionary:
            {"plain": a, "trained against PGD": b}.
        data: A pair of tensors or arrays (x, y), x inside the bounds of the threat and y integers from 0; a DataLoader or
            another iterable of pairs of tensors, which are concatenated in memory; or a `robustkit.data.Data`.
        threat: One or several threats: `Linf(8 / 255)`, or "linf:8/255".
        attacks: One or several attacks, objects or names as on the command line: `PGD(steps=100)`, "pgd:steps=100".
        goals: One or several of misclassify, least-likely, classify-as:K.
        limit: The largest number of examples.
        seed: The seed of all noise.
        progress: Show a progress bar on a terminal.

    Returns:
        The results: a record for each model, threat, attack and goal, and the worst case over attacks.

    Raises:
        ArgumentError: An argument is invalid, or arguments do not fit each other.
    """
    models = dict(model) if isinstance(model, Mapping) else {_name(Target.of(model)): model}
    targets = {name: one if isinstance(one, Target) else Target(one, batch_size=_BLOCK) for name, one in models.items()}
    for name in targets:
        if not isinstance(name, str):
            raise ArgumentError(f'model: the name {name!r} must be a string: {{"plain": a, "robust": b}}')
    examples = _load_data(data, limit)
    threats = [_spec_and_value("threat", one, Threat, specs.threat, specs.threat_to_spec) for one in _as_list(threat)]
    resolved_attacks = [_spec_and_value("attacks", one, Attack, specs.attack, repr) for one in _as_list(attacks)]
    goals = [_spec_and_value("goals", one, str, specs.goal, str)[0] for one in _as_list(goals)]
    defences = {name: defence_recipe(target) or NONE for name, target in targets.items()}
    cases = [
        ResolvedCase(Case(name, threat_spec, attack_spec, goal, defences[name]), attack, one, specs.goal(goal))
        for name in targets
        for threat_spec, one in threats
        for attack_spec, attack in resolved_attacks
        for goal in goals
    ]
    command = (
        f"robustkit.evaluate({', '.join(targets)}, {examples.spec}, threat={threat!r}, attacks={attacks!r}, "
        f"goals={goals!r}, limit={limit}, seed={seed})"
    )
    loaded = _load(targets, examples, cases, seed, command)
    return _report(loaded, list(_outcomes(loaded, None, Serial(), 1, progress)))


def _load(
    targets: Mapping[str, Target], examples: Data, resolved: Sequence[ResolvedCase], seed: int, command: str
) -> LoadedRun:
    """The loaded run of models in memory."""
    batch_size = max((target.batch_size for target in targets.values()), default=_BLOCK)
    devices = {_device(target) for target in targets.values()}
    if len(devices) > 1:
        raise ArgumentError(f"the models are on {', '.join(sorted(map(str, devices)))}; move them to one device")
    cases = tuple(one.case for one in resolved)
    plan = Plan(
        cases,
        examples.spec,
        seed=seed,
        block=max(_BLOCK, batch_size),
        batch_size=batch_size,
        device=str(next(iter(devices), "cpu")),
        threads=torch.get_num_threads(),
    )
    try:
        attacked = {case.model_under_test: targets[case.model] for case in cases}
        models = {
            name: ModelUnderTest(name, target, examples, plan, weights=target.module) for name, target in attacked.items()
        }
    except Exception as error:
        error.add_note(
            f"robustkit called a model with images of shape (N, {', '.join(map(str, examples.shape[1:]))}), those of the data"
        )
        raise
    return LoadedRun(plan, examples, models, resolved, command)


def _outcomes(loaded: LoadedRun, store: Store | None, executor: Executor, workers: int, progress: bool) -> Iterator[Outcome]:
    if not progress:
        yield from outcomes(loaded, store, executor)
        return
    with Live(Console(stderr=True), loaded, workers) as live:
        yield from outcomes(loaded, store, executor, live.progress)


def _report(loaded: LoadedRun, done: Sequence[Outcome]) -> Report:
    pictures = (picture for outcome in sorted(done, key=lambda outcome: outcome.index) for picture in outcome.pictures)
    return Report(results_of(loaded, done), tuple(pictures))


def _as_list(given: Any) -> Sequence[Any]:
    """A list or tuple as it is, anything else as a list of one."""
    return given if isinstance(given, list | tuple) else [given]


def _spec_and_value(
    name: str, given: Any, kind: type, parse: Callable[[str], Any], to_spec: Callable[[Any], str]
) -> tuple[str, Any]:
    """The spec of an argument and its value, whichever of the two was given."""
    if isinstance(given, str):
        return given, parse(given)
    if not isinstance(given, kind):
        example = {"threat": "Linf(8 / 255)", "attacks": "PGD(steps=100)", "goals": '"misclassify"'}[name]
        raise ArgumentError(f"{name}={given!r} must be {example}, or a name as on the command line; several as a list")
    return to_spec(given), given


def _load_data(given: Any, limit: int | None) -> Data:  # Any: tensors, arrays, a loader or Data
    if isinstance(given, Data):
        return given.part(0, limit)
    pair = isinstance(given, tuple | list) and len(given) == 2 and all(isinstance(part, Tensor | np.ndarray) for part in given)
    x, y = map(torch.as_tensor, given) if pair else _concatenate(given, limit)
    if x.shape[:1] != y.shape or not len(y) or y.dtype.is_floating_point or int(y.min()) < 0:
        raise ArgumentError(
            f"data: x has shape {tuple(x.shape)}, y is {y.dtype} of shape {tuple(y.shape)}; give images (N, C, H, W) and one "
            "label 0, 1, 2, ... per image"
        )
    x, y = x.detach().cpu(), y.detach().cpu().long()
    x = x.float() if x.dtype == torch.bfloat16 else x  # data are hashed through numpy, which has no bfloat16
    classes = tuple(str(label) for label in range(int(y.max()) + 1))
    return Data(x, y, classes, "(x, y)" if pair else type(given).__name__).part(0, limit)


def _concatenate(loader: Iterable[Any], limit: int | None) -> tuple[Tensor, Tensor]:
    """The batches of a loader, until there are `limit` examples."""
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
            f"data={type(loader).__name__} does not yield pairs of tensors (x, y) that can be concatenated ({error}); give two "
            "tensors, a DataLoader or a robustkit.data.Data"
        ) from error


def _name(target: Target) -> str:
    """The name of the function, or the class of the module."""
    return str(getattr(target.fn, "__name__", type(target.fn).__name__))


def _device(target: Target) -> torch.device:
    parameters = target.module.parameters() if target.module is not None else iter(())
    return next((parameter.device for parameter in parameters), torch.device("cpu"))
