"""Runs a plan: each case block by block, so that memory does not grow with the number of images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustkit import data as real_data
from robustkit._world import held, seeded
from robustkit.attack import Attack
from robustkit.bench import specs
from robustkit.bench.models import load_model, model_hash
from robustkit.bench.plan import Case, Plan
from robustkit.bench.record import Record, make_record
from robustkit.bench.report import Picture
from robustkit.data import Data
from robustkit.errors import ArgumentError, RobustkitError
from robustkit.goals import Misclassify
from robustkit.result import Result
from robustkit.target import Target
from robustkit.threats import Threat

__all__ = ["Outcome", "run"]

BLOCK = 100  # images; fixed, so that a run is the same wherever it is cut
PICTURES = 4  # per record, from the first block

Progress = Callable[[Case, int, int], None]  # a case, how many more of its images are done, images of all cases


@final
@dataclass(frozen=True)
class Outcome:
    """What a case came to: its record, and a few of its images."""

    record: Record
    pictures: tuple[Picture, ...]


@final
@dataclass(frozen=True)
class _Subject:
    """A model on some data, and what it says before any attack."""

    spec: str
    model: nn.Module
    hash: str
    data: Data
    clean: NDArray[np.bool_]


@final
@dataclass
class _Blocks:
    """What is kept of the blocks of a case: a few bytes an image."""

    results: list[Result] = field(default_factory=list)
    robust: list[NDArray[np.bool_]] = field(default_factory=list)
    pictures: tuple[Picture, ...] = ()


def run(plan: Plan, progress: Progress = lambda case, images, total: None) -> Iterator[Outcome]:
    """Measure the cases of `plan` one after another.

    Everything that can be seen to be wrong is refused before the first attack.

    Args:
        plan: What to measure.
        progress: Called with a case, the number of its images that were just done, and the number of images of all cases.

    Raises:
        ArgumentError: A spec that means nothing, data or weights that cannot be read, a model that fails on the data.
        MissingExtraError: An optional dependency is needed.
    """
    for case in plan.cases:
        specs.attack(case.attack), specs.threat(case.threat), specs.goal(case.goal)
    data = real_data.load(plan.data).part(plan.offset, plan.limit)
    models = {spec: load_model(spec, plan.device) for spec in dict.fromkeys(case.model for case in plan.cases)}
    subjects = {spec: _subject(spec, model, data, plan) for spec, model in models.items()}
    for case in plan.cases:
        yield _measured(case, plan, subjects[case.model], progress)


def _subject(spec: str, model: nn.Module, data: Data, plan: Plan) -> _Subject:
    parts = [_logits(model, data.x[i : i + plan.batch_size], plan, spec) for i in range(0, len(data), plan.batch_size)]
    try:
        Misclassify().check(torch.cat(parts), data.y)
    except RobustkitError as error:
        raise ArgumentError(f"model {spec!r} on data {plan.data!r}: {error}") from error
    clean = ~Misclassify().success(torch.cat(parts), data.y)
    return _Subject(spec, model, model_hash(model), data, clean.numpy())


def _logits(model: nn.Module, x: Tensor, plan: Plan, spec: str) -> Any:  # Any: the goal says whether these are logits
    with torch.no_grad(), held(model, "eval"), seeded(plan.seed), _own_failures(spec, x):
        out = model(x.to(plan.device))
    if not isinstance(out, Tensor):
        raise ArgumentError(
            f"model {spec!r} returned {type(out).__name__}; it must map images (N, C, H, W) to logits (N, classes)"
        )
    return out.cpu()


class _own_failures:  # noqa: N801  a context manager reads like a function
    """A model's own exception, told in one line with the model's name and the shape that it was given."""

    def __init__(self, spec: str, x: Tensor) -> None:
        self.spec, self.shape = spec, tuple(x.shape)

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, RobustkitError):
            said = " ".join(str(error).split())[:300]
            raise ArgumentError(
                f"model {self.spec!r} raised {type(error).__name__} on images {self.shape}: {said}; "
                "it must take what the data holds"
            ) from error


def _measured(case: Case, plan: Plan, subject: _Subject, progress: Progress) -> Outcome:
    attack, threat, blocks = specs.attack(case.attack), specs.threat(case.threat), _Blocks()
    started = time.perf_counter()
    for first in range(0, len(subject.data), BLOCK):
        rows = slice(first, min(first + BLOCK, len(subject.data)))
        _add_block(blocks, case, plan, subject, attack, threat, rows)
        progress(case, rows.stop - rows.start, len(plan.cases) * len(subject.data))
    seconds = time.perf_counter() - started
    result, robust = Result.cat(blocks.results), np.concatenate(blocks.robust)
    record = make_record(case, plan, access=attack.access, result=result, clean=subject.clean, robust=robust, seconds=seconds)
    record |= {"model_hash": subject.hash, "data_hash": subject.data.hash}
    return Outcome(record, blocks.pictures)


def _add_block(blocks: _Blocks, case: Case, plan: Plan, subject: _Subject, attack: Attack, threat: Threat,
               rows: slice) -> None:  # fmt: skip
    aim, model = specs.goal(case.goal), subject.model
    x, y = subject.data.x[rows].to(plan.device), subject.data.y[rows].to(plan.device)
    ids = torch.arange(rows.start, rows.stop) + plan.offset
    target = Target(model, batch_size=plan.batch_size)
    with _own_failures(case.model, x):
        result = attack(target, x, aim.ref(model, x, y), goal=aim.goal, threat=threat, seed=plan.seed, ids=ids)
    before = torch.from_numpy(subject.clean[rows])
    if aim.goal == Misclassify():
        after = ~result.success.cpu()
    else:
        after = ~Misclassify().success(_logits(model, result.x_adv, plan, case.model), y.cpu())
    if not blocks.pictures:
        blocks.pictures = _pictures(case, plan, subject, result, rows.start)
    blocks.robust.append((before & after).numpy())
    blocks.results.append(replace(result, x_adv=result.x_adv[:, :0]))  # the images themselves are let go


def _pictures(case: Case, plan: Plan, subject: _Subject, result: Result, first: int) -> tuple[Picture, ...]:
    """The first images of the block that the model gets right without an attack."""
    chosen = np.flatnonzero(subject.clean[first : first + len(result)])[:PICTURES]
    if not len(chosen) or subject.data.x.shape[1] not in (1, 3):
        return ()
    clean, adversarial = subject.data.x[first + chosen], result.x_adv[torch.from_numpy(chosen)].cpu()
    said = [_logits(subject.model, x, plan, case.model).double().softmax(1).max(1) for x in (clean, adversarial)]
    name = subject.data.classes
    return tuple(
        Picture(
            case.model, case.attack, case.goal, case.threat, plan.offset + first + int(i), clean[k].numpy(),
            adversarial[k].numpy(), name[int(subject.data.y[first + i])], _name(name, int(said[0].indices[k])),
            float(said[0].values[k]), _name(name, int(said[1].indices[k])), float(said[1].values[k]),
            float(result.size[i]), bool(result.success[i]),
        )
        for k, i in enumerate(chosen)
    )  # fmt: skip


def _name(names: Sequence[str], index: int) -> str:
    return names[index] if index < len(names) else str(index)
