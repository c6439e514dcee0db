"""Where attacks may begin: at what earlier runs have found on the same images."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from robustkit.bench.execution.adversarial_file import SUFFIXES, Foreign, read_foreign
from robustkit.bench.execution.model_under_test import hash_matches
from robustkit.bench.plan import specs
from robustkit.bench.plan.plan import Plan
from robustkit.bench.plan.plan_file import read_plan
from robustkit.bench.results.block import Block, BlockHeader
from robustkit.bench.results.store import files_of
from robustkit.data import Data
from robustkit.errors import ArgumentError
from robustkit.threats import Threat

__all__ = ["WarmStarts", "read_warm_starts"]


@final
@dataclass(frozen=True, eq=False)
class _Find:
    """A block of an earlier run that keeps images: what it is about, and which images."""

    goal: str
    threat: Threat
    pin: str  # of the model
    glance: BlockHeader


@final
@dataclass(frozen=True, eq=False)
class WarmStarts:
    """What earlier runs have found; the images stay in their files until they are asked for.

    Attributes:
        hashes: What each run or file holds, under the name that it has among the hashes of a plan.
        finds: Of our own runs.
        files: Of others.
    """

    hashes: Mapping[str, str] = field(default_factory=dict)
    finds: Sequence[_Find] = ()
    files: Sequence[Foreign] = ()

    def images(self, goal: str, threat: Threat, pin: str, ids: Tensor, like: Tensor) -> Tensor:
        """The best known adversarial image of each of the examples `ids` (n,), NaN where none is known, (n, *S).

        Best is one that was made for the very model, of the pin; then one that is known to have worked on another; then one
        of a file that does not say. Of equal ones the one with the smallest change. Of our runs only threats of the same kind
        count, and the same goal; a file says neither, and is asked about all the same.

        Args:
            goal: The goal's spec.
            threat: What may change.
            pin: Of the model.
            ids: Which examples.
            like: These, unchanged, (n, *S).
        """
        starts, place = torch.full_like(like, torch.nan), {index: at for at, index in enumerate(ids.tolist())}
        best: dict[int, _Rank] = {}
        self._rank_finds(goal, threat, pin, place, best)
        given = [_given(file, place, threat, like, number, best) for number, file in enumerate(self.files, len(self.finds))]
        for number, find in enumerate(self.finds):
            rows, places = _taken(best, number)
            if rows:
                images = Block.load(find.glance.path).images
                assert images is not None  # as was seen when the run was read
                starts[places] = images[rows].to(starts)
        for number, images in enumerate(given, len(self.finds)):
            rows, places = _taken(best, number)
            starts[places] = images[rows].to(starts)
        return starts

    def _rank_finds(self, goal: str, threat: Threat, pin: str, place: Mapping[int, int], best: dict[int, _Rank]) -> None:
        """Enter what our runs have found for the examples at these places."""
        first, last = min(place), max(place)
        for number, find in enumerate(self.finds):
            if find.goal != goal or type(find.threat) is not type(threat) or find.threat.bounds != threat.bounds:
                continue
            if not find.glance.ids or find.glance.ids[0] > last or find.glance.ids[-1] < first:
                continue  # of other images: of a large run, nearly all are
            other = 0 if hash_matches(pin, find.pin) else 1
            for row, (index, size) in enumerate(zip(find.glance.ids, find.glance.sizes, strict=True)):
                if index in place:
                    _enter(best, place[index], (other, size, number, row))


_Rank = tuple[int, float, int, int]  # how well it is known to work, how large it is, whose it is, which row


def _enter(best: dict[int, _Rank], at: int, found: _Rank) -> None:
    best[at] = min(best.get(at, found), found)


def _taken(best: Mapping[int, _Rank], number: int) -> tuple[list[int], list[int]]:
    """Which rows of a source are the best known, and for which examples."""
    taken = [(found[3], at) for at, found in sorted(best.items()) if found[2] == number]
    return [row for row, _ in taken], [at for _, at in taken]


def _given(
    file: Foreign, place: Mapping[int, int], threat: Threat, like: Tensor, number: int, best: dict[int, _Rank]
) -> Tensor:
    """The images of a file for these examples, (m, *S), once they are entered; rows without any change are none."""
    rows = [row for row, index in enumerate(file.ids) if index in place and (file.success is None or file.success[row])]
    if not rows:
        return like[:0]
    images, at = file.images(rows).to(like), [place[file.ids[row]] for row in rows]
    sizes = threat.size(images, like[at]).tolist()
    for row, (where, size) in enumerate(zip(at, sizes, strict=True)):
        if 0 < size < math.inf:  # false for NaN too
            _enter(best, where, (1 if file.success is not None else 2, size, number, row))
    return images


def read_warm_starts(runs: Sequence[str], data: Data, taken: range | None = None) -> WarmStarts:
    """What the runs in these folders have found, and what these files hold.

    Args:
        runs: The folders and files.
        data: All the images, of which a run may have taken a part.
        taken: Which of them the attacks are run on; default all.

    Raises:
        ArgumentError: A folder holds no run, one of other data, or one without images; a file does not fit the data.
    """
    finds: list[_Find] = []
    files: list[Foreign] = []
    hashes = {}
    for run in runs:
        if Path(run).suffix in SUFFIXES and not Path(run).is_dir():
            files.append(read_foreign(run, data, range(len(data)) if taken is None else taken))
            hashes[f"start-from:{run}"] = files[-1].digest
            continue
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
    return WarmStarts(hashes, finds, files)


def _plan(run: str) -> Plan:
    try:
        return read_plan(Path(run) / "plan.toml")
    except ArgumentError as error:
        raise ArgumentError(
            f"start-from={run!r} holds no plan.toml that can be read; name a folder that robustkit bench has written, or an "
            "npz or safetensors file with x_adv"
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
            glance = BlockHeader.of(file)
            if glance is not None:
                yield _Find(case.goal, threat, plan.pins.get(case.subject, "none"), glance)
