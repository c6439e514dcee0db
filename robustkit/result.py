"""What came out of an attack: the adversarial examples, the facts about each, and what they cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from robustkit.errors import ArgumentError
from robustkit.ledger import Ledger, Remark, Stage

__all__ = ["Result"]

_TENSORS = ("x_adv", "success", "rate", "size", "forwards", "backwards", "flat")


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
    """

    x_adv: Tensor
    success: Tensor
    rate: Tensor
    size: Tensor
    forwards: Tensor
    backwards: Tensor
    flat: Tensor
    flags: tuple[Remark, ...] = ()
    notes: tuple[Remark, ...] = ()
    stages: tuple[Stage, ...] = field(default=(), kw_only=True)

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
        """Results of parts of a batch as one; remarks are told once, stages of one name are added up."""
        stages: dict[str, Stage] = {}
        for stage in (stage for part in parts for stage in part.stages):
            old = stages.get(stage.name, Stage(stage.name, 0, 0, 0))
            stages[stage.name] = Stage(stage.name, old.forwards + stage.forwards, old.backwards + stage.backwards,
                                       old.solved + stage.solved)  # fmt: skip
        return cls(
            **{name: torch.cat([getattr(part, name) for part in parts]) for name in _TENSORS},
            flags=tuple(dict.fromkeys(flag for part in parts for flag in part.flags)),
            notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
            stages=tuple(stages.values()),
        )

    @classmethod
    def room(cls, x: Tensor) -> Result:
        """Room for the result of attacking x, (N, *S), to be filled part by part."""
        n, device = len(x), x.device
        yes, ledger = torch.zeros(n, dtype=torch.bool, device=device), Ledger(n, device)
        counts = ledger.forwards, ledger.backwards, ledger.flat
        return cls(torch.empty_like(x), yes, yes.float(), yes.double(), *counts)

    def fill(self, rows: slice, part: Result) -> Result:
        """Copy the rows of `part` in; what it told comes back, without tensors of its own.

        Parts that are kept until the end take the images twice, and leave the memory between them in pieces.
        """
        for name in _TENSORS:
            getattr(self, name)[rows] = getattr(part, name)
        return replace(self, flags=part.flags, notes=part.notes, stages=part.stages,
                       **{name: getattr(self, name)[:0] for name in _TENSORS})  # fmt: skip

    def after(self, spent: Ledger) -> Result:
        """The same result with the cost of what went before it, one stage "learning"."""
        counts = {name: getattr(self, name) + getattr(spent, name) for name in ("forwards", "backwards", "flat")}
        stage = Stage("learning", int(spent.forwards.sum()), int(spent.backwards.sum()), 0)
        return replace(self, **counts, stages=(stage, *self.stages))

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file."""
        told = {kind: [asdict(item) for item in getattr(self, kind)] for kind in ("flags", "notes", "stages")}
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        Path(path).write_bytes(save(tensors, metadata={"robustkit": json.dumps(told)}))

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read what `save` wrote; no code is executed.

        Raises:
            ArgumentError: The file is missing or is no result.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                tensors = [file.get_tensor(name) for name in _TENSORS]
                told = json.loads((file.metadata() or {})["robustkit"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ArgumentError(f"path={str(path)!r} is not a result written by Result.save ({error})") from error
        remarks = [tuple(Remark(**item) for item in told[kind]) for kind in ("flags", "notes")]
        return cls(*tensors, *remarks, stages=tuple(Stage(**item) for item in told["stages"]))
