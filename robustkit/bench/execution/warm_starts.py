"""Warm starts: adversarial images from earlier runs and from files, at which attacks on the same images start."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, final

import torch
from torch import Tensor

from robustkit.bench.execution.adversarial_file import SUFFIXES, AdversarialFile, read_adversarial_file
from robustkit.bench.plan import specs
from robustkit.bench.plan.hashes import hash_matches
from robustkit.bench.plan.plan import Plan
from robustkit.bench.plan.plan_file import read_plan
from robustkit.bench.results.block import Block, BlockHeader
from robustkit.bench.results.store import block_files
from robustkit.data import Data
from robustkit.errors import ArgumentError
from robustkit.threats import Threat

__all__ = ["WarmStarts", "read_warm_starts"]


@final
@dataclass(frozen=True, eq=False)
class _StoredBlock:
    """A block of an earlier run that has adversarial images.

    Attributes:
        goal: The spec of its goal.
        threat: Its threat.
        signature: The signature of its model (`ModelUnderTest.signature`).
        header: Its file, and which images it has.
    """

    goal: str
    threat: Threat
    signature: str
    header: BlockHeader


class _Candidate(NamedTuple):
    """An adversarial image of an example; the smallest tuple is the best candidate."""

    doubt: int  # 0: succeeded on the same model; 1: succeeded on some model; 2: unknown
    size: float  # of the perturbation
    source: int  # the number of the block or file
    row: int  # in that block or file


@final
@dataclass(frozen=True, eq=False)
class WarmStarts:
    """Adversarial images from earlier runs and files. The images stay on disk until they are needed.

    Attributes:
        hashes: A hash of the content of each run or file, under its key among the hashes of a plan.
        blocks: The blocks of earlier runs.
        files: Other files.
    """

    hashes: Mapping[str, str] = field(default_factory=dict)
    blocks: Sequence[_StoredBlock] = ()
    files: Sequence[AdversarialFile] = ()

    def starting_points(self, goal: str, threat: Threat, signature: str, ids: Tensor, x: Tensor) -> Tensor:
        """The best adversarial image of each example, (n, *S), NaN where there is none.

        Images that succeeded on the same model come first, then those that succeeded on another one, then those of a file that
        does not say; among these the one with the smallest perturbation. Blocks of earlier runs count only if they have the
        same goal and the same type of threat. Files state neither, so they always count.

        Args:
            goal: The spec of the goal.
            threat: The threat.
            signature: The signature of the model.
            ids: The index in the data of each example, (n,).
            x: The clean examples, (n, *S).
        """
        starts, position = torch.full_like(x, torch.nan), {index: at for at, index in enumerate(ids.tolist())}
        best: dict[int, _Candidate] = {}
        self._rank_blocks(goal, threat, signature, position, best)
        from_files = [
            _rank_file(file, position, threat, x, number, best) for number, file in enumerate(self.files, len(self.blocks))
        ]
        for number, block in enumerate(self.blocks):
            rows, positions = _chosen_rows(best, number)
            if rows:
                images = Block.load(block.header.path).adversarial
                assert images is not None  # blocks without images have no header
                starts[positions] = images[rows].to(starts)
        for number, images in enumerate(from_files, len(self.blocks)):
            rows, positions = _chosen_rows(best, number)
            starts[positions] = images[rows].to(starts)
        return starts

    def _rank_blocks(
        self, goal: str, threat: Threat, signature: str, position: Mapping[int, int], best: dict[int, _Candidate]
    ) -> None:
        """Update the best candidates with the images of earlier runs."""
        first, last = min(position), max(position)
        for number, block in enumerate(self.blocks):
            if block.goal != goal or type(block.threat) is not type(threat) or block.threat.bounds != threat.bounds:
                continue
            ids = block.header.ids
            if not ids or ids[0] > last or ids[-1] < first:
                continue  # other images, as in nearly all blocks of a large run
            doubt = 0 if hash_matches(signature, block.signature) else 1
            for row, (index, size) in enumerate(zip(ids, block.header.sizes, strict=True)):
                if index in position:
                    _update(best, position[index], _Candidate(doubt, size, number, row))


def _update(best: dict[int, _Candidate], at: int, candidate: _Candidate) -> None:
    best[at] = min(best.get(at, candidate), candidate)


def _chosen_rows(best: Mapping[int, _Candidate], source: int) -> tuple[list[int], list[int]]:
    """The rows of a block or file that are best candidates, and the positions of their examples."""
    chosen = [(candidate.row, at) for at, candidate in sorted(best.items()) if candidate.source == source]
    return [row for row, _ in chosen], [at for _, at in chosen]


def _rank_file(
    file: AdversarialFile, position: Mapping[int, int], threat: Threat, x: Tensor, number: int, best: dict[int, _Candidate]
) -> Tensor:
    """Update the best candidates with the images of a file, and return its images for these examples, (m, *S).

    Rows that are NaN or equal to the clean example are skipped.
    """
    rows = [row for row, index in enumerate(file.ids) if index in position and (file.success is None or file.success[row])]
    if not rows:
        return x[:0]
    images, positions = file.images(rows).to(x), [position[file.ids[row]] for row in rows]
    sizes = threat.size(images, x[positions]).tolist()
    for row, (at, size) in enumerate(zip(positions, sizes, strict=True)):
        if 0 < size < math.inf:  # False for NaN
            _update(best, at, _Candidate(1 if file.success is not None else 2, size, number, row))
    return images


def read_warm_starts(paths: Sequence[str], data: Data, selected: range | None = None) -> WarmStarts:
    """Read which adversarial images earlier runs and files have.

    Args:
        paths: Folders of runs, and files.
        data: All images of the data; an earlier run may have used a part of them.
        selected: The images that the new run uses; by default all.

    Raises:
        ArgumentError: A folder has no run, a run on other data, or no adversarial images; a file does not fit the data.
    """
    blocks: list[_StoredBlock] = []
    files: list[AdversarialFile] = []
    hashes = {}
    for path in paths:
        if Path(path).suffix in SUFFIXES and not Path(path).is_dir():
            files.append(read_adversarial_file(path, data, range(len(data)) if selected is None else selected))
            hashes[f"start-from:{path}"] = files[-1].digest
            continue
        plan = _read_plan(path)
        if not _is_part(plan, data):
            raise ArgumentError(
                f"start-from={path!r} is a run on other images (data={plan.data!r}, offset={plan.offset}); name a run on "
                f"images of data={data.spec!r}, or leave it out"
            )
        stored = list(_stored_blocks(path, plan))
        if not stored:
            raise ArgumentError(
                f"start-from={path!r} has no adversarial images: no block is finished, the run is so large that it needs "
                "--save-adversarial, or an older version wrote it; run it again, or leave it out"
            )
        digests = "".join(sorted(block.header.digest for block in stored))
        hashes[f"start-from:{path}"] = hashlib.sha256(digests.encode()).hexdigest()[:16]
        blocks += stored
    return WarmStarts(hashes, blocks, files)


def _read_plan(run: str) -> Plan:
    try:
        return read_plan(Path(run) / "plan.toml")
    except ArgumentError as error:
        raise ArgumentError(
            f"start-from={run!r} has no readable plan.toml; name a folder written by robustkit bench, or an npz or safetensors "
            "file with x_adv"
        ) from error


def _is_part(plan: Plan, data: Data) -> bool:
    """Whether the run used a part of these images, with the same indices."""
    try:
        return data.part(plan.offset, plan.limit).hash == plan.expected_hashes.get(plan.data)
    except ArgumentError:  # the offset lies beyond the data
        return False


def _stored_blocks(run: str, plan: Plan) -> Iterator[_StoredBlock]:
    """The blocks of a run that have adversarial images."""
    for number, case in enumerate(plan.cases):
        threat = specs.threat(case.threat)
        for file in block_files(Path(run), number):
            header = BlockHeader.read(file)
            if header is not None:
                yield _StoredBlock(case.goal, threat, plan.expected_hashes.get(case.model_under_test, "none"), header)
