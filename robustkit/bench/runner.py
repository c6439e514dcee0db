"""Runs a plan: each case block by block, so that memory does not grow with the number of images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray

from robustkit import data as real_data
from robustkit.attack import Attack
from robustkit.bench import specs
from robustkit.bench.plan import Case, Plan
from robustkit.bench.record import Record, make_record
from robustkit.bench.report import Picture
from robustkit.bench.subject import BLOCK, Subject
from robustkit.goals import Misclassify
from robustkit.result import Result
from robustkit.target import Target
from robustkit.threats import Threat

__all__ = ["Outcome", "run"]

PICTURES = 4  # per record, from the first block

Progress = Callable[[Case, int, int], None]  # a case, how many more of its images are done, images of all cases


@final
@dataclass(frozen=True)
class Outcome:
    """What a case came to: its record, a few of its images, and which images stayed right, before and after, (N,)."""

    record: Record
    pictures: tuple[Picture, ...]
    robust: NDArray[np.bool_]


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
    for case in plan.cases:  # read once to be refused here if they mean nothing
        specs.attack(case.attack), specs.threat(case.threat), specs.goal(case.goal)
    data = real_data.load(plan.data).part(plan.offset, plan.limit)
    subjects = {spec: Subject(spec, data, plan) for spec in dict.fromkeys(case.model for case in plan.cases)}
    for case in plan.cases:
        subjects[case.model].check(case)
    for case in plan.cases:
        yield _measured(case, plan, subjects[case.model], progress)


def _measured(case: Case, plan: Plan, subject: Subject, progress: Progress) -> Outcome:
    attack, threat, blocks = specs.attack(case.attack), specs.threat(case.threat), _Blocks()
    started = time.perf_counter()
    for first in range(0, len(subject.data), BLOCK):
        rows = slice(first, min(first + BLOCK, len(subject.data)))
        _add_block(blocks, case, plan, subject, attack, threat, rows)
        progress(case, rows.stop - rows.start, len(plan.cases) * len(subject.data))
    seconds = time.perf_counter() - started
    result, robust = Result.cat(blocks.results), np.concatenate(blocks.robust)
    record = make_record(case, plan, attack=attack, result=result, clean=subject.clean, robust=robust, seconds=seconds)
    record |= {"model_hash": subject.hash, "data_hash": subject.data.hash}  # of the weights and of the images
    return Outcome(record, blocks.pictures, robust)


def _add_block(blocks: _Blocks, case: Case, plan: Plan, subject: Subject, attack: Attack, threat: Threat,
               rows: slice) -> None:  # fmt: skip
    aim, model = specs.goal(case.goal), subject.model
    x, y = subject.data.x[rows].to(plan.device), subject.data.y[rows].to(plan.device)
    ids = torch.arange(rows.start, rows.stop) + plan.offset
    ref = aim.ref(model, x, y, plan.batch_size)
    result = attack(Target(model, batch_size=plan.batch_size), x, ref, goal=aim.goal, threat=threat, seed=plan.seed, ids=ids)
    if aim.goal == Misclassify():
        after = ~result.success.cpu()
    else:
        labels = subject.data.y[rows]
        after = ~Misclassify().success(subject.logits(result.x_adv, labels, rows.start, "after"), labels)
    if not blocks.pictures:
        blocks.pictures = _pictures(case, plan, subject, result, rows.start)
    blocks.robust.append(subject.clean[rows] & after.numpy())
    blocks.results.append(replace(result, x_adv=x.new_empty(len(x), 0)))  # not a view, which would keep the images


def _pictures(case: Case, plan: Plan, subject: Subject, result: Result, first: int) -> tuple[Picture, ...]:
    """The first images of the block that the model gets right without an attack."""
    chosen = np.flatnonzero(subject.clean[first : first + len(result)])[:PICTURES]
    if not len(chosen) or subject.data.x.shape[1] not in (1, 3):
        return ()
    clean, labels = subject.data.x[first + chosen], subject.data.y[first + chosen]
    adversarial = result.x_adv[torch.from_numpy(chosen)].cpu()
    said = [subject.logits(x, labels, first, "pictures").double().softmax(1).max(1) for x in (clean, adversarial)]
    names = subject.data.classes
    return tuple(
        Picture(
            case.model, case.attack, case.goal, case.threat, plan.offset + first + int(i), clean[k].numpy(),
            adversarial[k].numpy(), names[int(labels[k])], _name(names, int(said[0].indices[k])),
            float(said[0].values[k]), _name(names, int(said[1].indices[k])), float(said[1].values[k]),
            float(result.size[i]), bool(result.success[i]),
        )
        for k, i in enumerate(chosen)
    )  # fmt: skip


def _name(names: Sequence[str], index: int) -> str:
    return names[index] if index < len(names) else str(index)
