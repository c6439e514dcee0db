"""The result of an attack: the adversarial examples, their success and size, the cost, flags and notes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from robustkit._engine.ledger import Check, Ledger, Message, Stage, sum_checks
from robustkit._engine.schema import upgrade_record
from robustkit.errors import ArgumentError

__all__ = ["Result"]

_TENSORS = ("x_adv", "success", "rate", "size", "forwards", "backwards", "flat")
_REPORTS = {"flags": Message, "notes": Message, "stages": Stage, "checks": Check}


@final
@dataclass(frozen=True, eq=False)
class Result:
    """The result of an attack on N examples, evaluated on the deployed function.

    Attributes:
        x_adv: The adversarial examples, (N, *S), inside the threat, in the dtype and on the device of the input.
        success: Whether the goal is reached at `x_adv`, (N,) bool.
        rate: The share of fresh draws on which it is reached, (N,) float32; 0 or 1 for deterministic targets.
        size: The size of the perturbation, (N,) float64, in the unit of the threat's eps.
        forwards: Number of forward passes of each example, the final evaluation included, (N,) int64.
        backwards: Number of gradients computed, (N,) int64.
        flat: Number of gradients without a signal, (N,) int64.
        flags: Reasons not to believe the numbers.
        notes: Further information.
        stages: Cost of each part of the run and number of examples that it solved, over all examples.
        solver: Index into `stages` of the stage that solved each example; -1 where none did, (N,) int64.
        checks: Outcomes of the diagnostic checks; flags and notes follow from their sums over all batches of a run.
    """

    x_adv: Tensor
    success: Tensor
    rate: Tensor
    size: Tensor
    forwards: Tensor
    backwards: Tensor
    flat: Tensor
    flags: tuple[Message, ...] = ()
    notes: tuple[Message, ...] = ()
    stages: tuple[Stage, ...] = field(default=(), kw_only=True)
    solver: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64), kw_only=True)
    checks: tuple[Check, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        if not len(self.solver):
            object.__setattr__(self, "solver", torch.full_like(self.success, -1, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.x_adv)

    def __repr__(self) -> str:
        messages = "".join(f", {message.name}: {message.why}" for message in (*self.flags, *self.notes))
        return (
            f"Result({int(self.success.sum())} of {len(self)} succeeded, {int(self.forwards.sum())} forwards, "
            f"{int(self.backwards.sum())} backwards{messages})"
        )

    @classmethod
    def cat(cls, parts: Sequence[Result]) -> Result:
        """Concatenate results; equal flags and notes are kept once, stages and checks of the same name are summed."""
        stages: dict[str, Stage] = {}
        for stage in (stage for part in parts for stage in part.stages):
            old = stages.get(stage.name, Stage(stage.name, 0, 0, 0))
            stages[stage.name] = Stage(
                stage.name, old.forwards + stage.forwards, old.backwards + stage.backwards, old.solved + stage.solved
            )
        index = {name: number for number, name in enumerate(stages)}
        return cls(
            **{name: torch.cat([getattr(part, name) for part in parts]) for name in _TENSORS},
            flags=tuple(dict.fromkeys(flag for part in parts for flag in part.flags)),
            notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
            stages=tuple(stages.values()),
            solver=torch.cat([part._solver_by(index) for part in parts]),
            checks=sum_checks(check for part in parts for check in part.checks),
        )

    def _solver_by(self, index: dict[str, int]) -> Tensor:
        """`solver` in the indices that `index` assigns to the stage names, (N,) int64."""
        new_index = torch.tensor([*(index[stage.name] for stage in self.stages), -1], device=self.solver.device)
        return new_index[self.solver]

    @classmethod
    def allocate(cls, x: Tensor) -> Result:
        """An empty result for the inputs x, (N, *S), to be filled by `write`."""
        n, device = len(x), x.device
        success, ledger = torch.zeros(n, dtype=torch.bool, device=device), Ledger(n, device)
        counts = ledger.forwards, ledger.backwards, ledger.flat
        return cls(torch.empty_like(x), success, success.float(), success.double(), *counts)

    def write(self, rows: slice, part: Result) -> Result:
        """Copy the tensors of `part` into `rows`; returns the rest of `part`, with empty tensors.

        Keeping all parts until the end would hold the images twice and fragment the memory. The solver stays with the
        part, since its indices refer to the stages of the part.
        """
        for name in _TENSORS:
            getattr(self, name)[rows] = getattr(part, name)
        return replace(part, **{name: getattr(self, name)[:0] for name in _TENSORS})

    def with_messages(self, parts: Result) -> Result:
        """The same tensors with the flags, notes, stages, solver and checks of `parts`, joined by `cat`."""
        return replace(
            self, flags=parts.flags, notes=parts.notes, stages=parts.stages, solver=parts.solver, checks=parts.checks
        )

    def plus_cost(self, learning: Ledger) -> Result:
        """The same result with the cost of learning added, as a first stage "learning"."""
        counts = {name: getattr(self, name) + getattr(learning, name) for name in ("forwards", "backwards", "flat")}
        stage = Stage("learning", int(learning.forwards.sum()), int(learning.backwards.sum()), 0)
        solver = torch.where(self.solver < 0, self.solver, self.solver + 1)
        return replace(self, **counts, stages=(stage, *self.stages), solver=solver)

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file."""
        tensors = {name: getattr(self, name).contiguous() for name in (*_TENSORS, "solver")}
        Path(path).write_bytes(save(tensors, metadata={"robustkit": json.dumps(self.to_json())}))

    def to_json(self) -> dict[str, list[dict[str, Any]]]:
        """Flags, notes, stages and checks in types that JSON has; `from_json` reads them back."""
        return {name: [asdict(item) for item in getattr(self, name)] for name in _REPORTS}

    @staticmethod
    def from_json(record: dict[str, Any]) -> dict[str, Any]:
        """The output of `to_json`, of any schema version, as fields of a result."""
        upgraded = upgrade_record(record)
        return {name: tuple(kind(**item) for item in upgraded[name]) for name, kind in _REPORTS.items()}

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read a file written by `save`; no code is executed.

        Raises:
            ArgumentError: The file is missing or is not a result.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in (*_TENSORS, "solver")}
                reports = cls.from_json(json.loads((file.metadata() or {})["robustkit"]))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ArgumentError(f"path={str(path)!r} is not a result written by Result.save ({error})") from error
        return cls(**tensors, **reports)
