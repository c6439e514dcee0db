"""Where attacks may begin: at what earlier runs have found on the same images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from robustkit.bench import specs
from robustkit.bench.block import Block, Glance
from robustkit.bench.plan import Plan
from robustkit.bench.plan_file import read_plan
from robustkit.bench.store import files_of
from robustkit.bench.subject import is_pinned
from robustkit.data import Data
from robustkit.errors import ArgumentError
from robustkit.threats import Threat

__all__ = ["Finds", "read_finds"]


@final
@dataclass(frozen=True, eq=False)
class _Find:
    """A block of an earlier run that keeps images: what it is about, and which images."""

    goal: str
    threat: Threat
    pin: str  # of the model
    glance: Glance


@final
@dataclass(frozen=True, eq=False)
class Finds:
    """What earlier runs have found; the images stay in their files until they are asked for.

    Attributes:
        hashes: What each run holds, under the name that it has among the hashes of a plan.
    """

    hashes: Mapping[str, str] = field(default_factory=dict)
    finds: Sequence[_Find] = ()

    def images(self, goal: str, threat: Threat, pin: str, ids: Tensor, like: Tensor) -> Tensor:
        """The best known adversarial image of each of the examples `ids` (n,), NaN where none is known, (n, *S).

        Best is one that was made for the very model, of the pin, before one that was made for another; then the one with the
        smallest change. Only threats of the same kind count, and the same goal.
        """
        starts = torch.full_like(like, torch.nan)
        for find, rows, places in self._best(goal, threat, pin, ids):
            images = Block.load(find.glance.path).images
            assert images is not None  # as was seen when the run was read
            starts[places] = images[rows].to(starts)
        return starts

    def _best(self, goal: str, threat: Threat, pin: str, ids: Tensor) -> Iterator[tuple[_Find, list[int], list[int]]]:
        """Blocks with the images that are taken from each, and the examples that they are for."""
        place, first, last = {index: at for at, index in enumerate(ids.tolist())}, int(ids.min()), int(ids.max())
        best: dict[int, tuple[bool, float, int, int]] = {}
        for number, find in enumerate(self.finds):
            if find.goal != goal or type(find.threat) is not type(threat) or find.threat.bounds != threat.bounds:
                continue
            if not find.glance.ids or find.glance.ids[0] > last or find.glance.ids[-1] < first:
                continue  # of other images: of a large run, nearly all are
            other = not is_pinned(pin, find.pin)
            for row, (index, size) in enumerate(zip(find.glance.ids, find.glance.sizes, strict=True)):
                if index in place:
                    at, found = place[index], (other, size, number, row)
                    best[at] = min(best.get(at, found), found)
        for number, find in enumerate(self.finds):
            taken = [(found[3], at) for at, found in sorted(best.items()) if found[2] == number]
            if taken:
                yield find, [row for row, _ in taken], [at for _, at in taken]


def read_finds(runs: Sequence[str], data: Data) -> Finds:
    """What the runs in these folders have found.

    Args:
        runs: The folders.
        data: All the images, of which a run may have taken a part.

    Raises:
        ArgumentError: A folder holds no run, one of other data, or one without images.
    """
    finds: list[_Find] = []
    hashes = {}
    for run in runs:
        plan = _plan(run)
        if not _is_part(plan, data):
            raise ArgumentError(
                f"start-from={run!r} is a run on other images ({plan.data!r}, passing over {plan.offset}); name a run on those "
                f"of data={data.spec!r}, or leave it out"
            )
        found = list(_kept(run, plan))
        if not found:
            raise ArgumentError(
                f"start-from={run!r} keeps no adversarial images: nothing of it is finished, it is so large that "
                "--save-adversarial is needed, or an older version has written it; run it anew, or leave it out"
            )
        digests = "".join(sorted(find.glance.digest for find in found))
        hashes[f"start-from:{run}"] = hashlib.sha256(digests.encode()).hexdigest()[:16]
        finds += found
    return Finds(hashes, finds)


def _plan(run: str) -> Plan:
    try:
        return read_plan(Path(run) / "plan.toml")
    except ArgumentError as error:
        raise ArgumentError(
            f"start-from={run!r} holds no plan.toml that can be read; name a folder that robustkit bench has written"
        ) from error


def _is_part(plan: Plan, data: Data) -> bool:
    """Whether the run was made on a part of these images, each with the same index."""
    try:
        return data.part(plan.offset, plan.limit).hash == plan.pins.get(plan.data)
    except ArgumentError:  # it had more images than there are
        return False


def _kept(run: str, plan: Plan) -> Iterator[_Find]:
    for number, case in enumerate(plan.cases):
        threat = specs.threat(case.threat)
        for file in files_of(Path(run), number):
            glance = Glance.of(file)
            if glance is not None:
                yield _Find(case.goal, threat, plan.pins.get(case.model, "none"), glance)
