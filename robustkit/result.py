"""What came out of an attack: the adversarial examples, the facts about each, and what they cost."""

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
from robustkit._engine.schema import upgrade_facts
from robustkit.errors import ArgumentError

__all__ = ["Result"]

_TENSORS = ("x_adv", "success", "rate", "size", "forwards", "backwards", "flat")
_MESSAGES = {"flags": Message, "notes": Message, "stages": Stage, "checks": Check}


@final
@dataclass(frozen=True, eq=False)
class Result:
    """One row an example, judged on the deployed function.

    Attributes:
        x_adv: The adversarial examples, (N, *S), in the type and on the device of the input; in the threat.
        success: Whether the goal is reached there, (N,) bool.
        rate: The share of fresh draws on which it is reached, (N,) float32; 0 or 1 for deterministic targets.
        size: How much of the budget the change takes, (N,) float64, in units of the threat's eps.
        forwards: Images of this example that went through the model, judging included, (N,) int64.
        backwards: Gradients taken, (N,) int64.
        flat: Gradients that carried no signal, (N,) int64.
        flags: Alarms: reasons not to believe the numbers.
        notes: Facts worth knowing that are no alarm.
        stages: What each part of the run cost and solved, over all examples.
        solver: The number among the stages of the one that solved each example; -1 where none did, (N,) int64.
        evidence: What checks have seen; flags and notes follow from its sum over all parts of a run.
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
        told = "".join(f", {kind.name}: {kind.why}" for kind in (*self.flags, *self.notes))
        return (
            f"Result({int(self.success.sum())} of {len(self)} succeeded, {int(self.forwards.sum())} forwards, "
            f"{int(self.backwards.sum())} backwards{told})"
        )

    @classmethod
    def cat(cls, parts: Sequence[Result]) -> Result:
        """Results of parts of a batch as one; remarks are told once, stages and evidence of one name are added up."""
        stages: dict[str, Stage] = {}
        for stage in (stage for part in parts for stage in part.stages):
            old = stages.get(stage.name, Stage(stage.name, 0, 0, 0))
            stages[stage.name] = Stage(
                stage.name, old.forwards + stage.forwards, old.backwards + stage.backwards, old.solved + stage.solved
            )
        number = {name: at for at, name in enumerate(stages)}
        return cls(
            **{name: torch.cat([getattr(part, name) for part in parts]) for name in _TENSORS},
            flags=tuple(dict.fromkeys(flag for part in parts for flag in part.flags)),
            notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
            stages=tuple(stages.values()),
            solver=torch.cat([part._solver_among(number) for part in parts]),
            checks=sum_checks(one for part in parts for one in part.checks),
        )

    def _solver_among(self, number: dict[str, int]) -> Tensor:
        """The solver by the numbers that the stages have in another list."""
        known = torch.tensor([*(number[stage.name] for stage in self.stages), -1], device=self.solver.device)
        return known[self.solver]

    @classmethod
    def allocate(cls, x: Tensor) -> Result:
        """Room for the result of attacking x, (N, *S), to be filled part by part."""
        n, device = len(x), x.device
        yes, ledger = torch.zeros(n, dtype=torch.bool, device=device), Ledger(n, device)
        counts = ledger.forwards, ledger.backwards, ledger.flat
        return cls(torch.empty_like(x), yes, yes.float(), yes.double(), *counts)

    def write(self, rows: slice, part: Result) -> Result:
        """Copy the rows of `part` in; what it told comes back, without tensors of its own.

        Parts that are kept until the end take the images twice, and leave the memory between them in pieces. Only who solved
        which example stays with the part, since its stages may be others than those of the next.
        """
        for name in _TENSORS:
            getattr(self, name)[rows] = getattr(part, name)
        return replace(part, **{name: getattr(self, name)[:0] for name in _TENSORS})

    def with_messages(self, parts: Result) -> Result:
        """The same rows with what was told of the parts, joined by `cat`."""
        return replace(
            self, flags=parts.flags, notes=parts.notes, stages=parts.stages, solver=parts.solver, checks=parts.checks
        )

    def plus_cost(self, spent: Ledger) -> Result:
        """The same result with the cost of what went before it, one stage "learning"."""
        counts = {name: getattr(self, name) + getattr(spent, name) for name in ("forwards", "backwards", "flat")}
        stage = Stage("learning", int(spent.forwards.sum()), int(spent.backwards.sum()), 0)
        solver = torch.where(self.solver < 0, self.solver, self.solver + 1)
        return replace(self, **counts, stages=(stage, *self.stages), solver=solver)

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file."""
        tensors = {name: getattr(self, name).contiguous() for name in (*_TENSORS, "solver")}
        Path(path).write_bytes(save(tensors, metadata={"robustkit": json.dumps(self.to_json())}))

    def to_json(self) -> dict[str, list[dict[str, Any]]]:
        """What was told, ready for JSON; `from_json` reads it back."""
        return {kind: [asdict(item) for item in getattr(self, kind)] for kind in _MESSAGES}

    @staticmethod
    def from_json(facts: dict[str, Any]) -> dict[str, Any]:
        """What `to_json` gave, as fields of a result."""
        known = upgrade_facts(facts)
        return {kind: tuple(of(**item) for item in known[kind]) for kind, of in _MESSAGES.items()}

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read what `save` wrote; no code is executed.

        Raises:
            ArgumentError: The file is missing or is no result.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in (*_TENSORS, "solver")}
                told = cls.from_json(json.loads((file.metadata() or {})["robustkit"]))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ArgumentError(f"path={str(path)!r} is not a result written by Result.save ({error})") from error
        return cls(**tensors, **told)
