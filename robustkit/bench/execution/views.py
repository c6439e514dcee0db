"""An attack along every view of a target: what is robust along one may fall along the next."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from robustkit._engine.best_so_far import Keep
from robustkit._engine.ledger import Message
from robustkit._engine.tensors import expand_rows
from robustkit.attack import Attack
from robustkit.attacks import Standard
from robustkit.result import Result
from robustkit.target import Target

__all__ = ["attacked", "on_every_view"]


def attacked(attack: Attack, target: Target) -> tuple[str, ...]:
    """The views that the attack follows, in order: none where it asks for no gradient, one where it learns one change."""
    views = tuple(target.views) if attack.access == "white" else ()
    return views[:1] if attack.universal else views


def on_every_view(
    attack: Attack, target: Target, x: Tensor, ref: Tensor, *, ids: Tensor, keep: Keep, starts: Tensor | None, **asked: Any
) -> Result:  # Any: goal, threat and seed, as the attack takes them
    """The attack along the first view, then along each further one on what is left; judged on the deployed function throughout.

    What is left are the examples that are not solved; where the smallest change is wanted, all that need one. Stages of a
    further view carry its name. Alarms are those of the first view, the one that the target recommends: of the others they
    are notes, since a view without any signal takes nothing from what another has shown.

    Args:
        attack: What is run.
        target: What is attacked.
        x: The examples, (N, *S).
        ref: What the goal compares with, (N, ...).
        ids: Their names, (N,) int64.
        keep: Which point comes back.
        starts: Where the first attack may begin, (N, *S).
        **asked: Goal, threat and seed.
    """
    whole = attack(target, x, ref, ids=ids, keep=keep, starts=starts, **asked)
    for view in attacked(attack, target)[1:]:
        left = ~(whole.success & (whole.size == 0)) if keep == "smallest" else ~whole.success
        rows = left.nonzero().squeeze(1)
        if len(rows):
            part = _plain(attack)(target.with_view(view), x[rows], ref[rows], ids=ids[rows.to(ids.device)], keep=keep, **asked)
            whole = _joined(whole, rows, part, view)
    return whole


def _plain(attack: Attack) -> Attack:
    """Without the checks of the deployed function, which are done, and would call for more where a view is blind."""
    return replace(attack, audit=False) if isinstance(attack, Standard) else attack


def _joined(whole: Result, rows: Tensor, part: Result, view: str) -> Result:
    """A result with that of some of its examples along another view."""
    better = part.success & (~whole.success[rows] | (part.size < whole.size[rows]))
    kept = {
        name: getattr(whole, name).index_copy(
            0, rows, torch.where(expand_rows(better, getattr(part, name)), getattr(part, name), getattr(whole, name)[rows])
        )
        for name in ("x_adv", "success", "rate", "size")
    }
    spent = {name: getattr(whole, name).index_add(0, rows, getattr(part, name)) for name in ("forwards", "backwards")}
    solver = torch.where(better, part.solver + len(whole.stages), whole.solver[rows])
    told = [flag for flag in part.flags if flag not in whole.flags]
    notes = [Message("other-view", f"view {view!r} by itself would raise {flag.name}: {flag.why}") for flag in told]
    return replace(
        whole,
        **kept,
        **spent,
        flat=whole.flat.index_copy(0, rows, _flat(whole, rows, part)),
        notes=tuple(dict.fromkeys((*whole.notes, *notes, *part.notes))),
        stages=(*whole.stages, *(replace(stage, name=f"{stage.name} along {view}") for stage in part.stages)),
        solver=whole.solver.index_copy(0, rows, solver),
    )


def _flat(whole: Result, rows: Tensor, part: Result) -> Tensor:
    """Gradients without signal: an example is blind only where it is along every view."""
    flat, other = whole.flat[rows], part.flat
    blind, also = 2 * flat > whole.backwards[rows], 2 * other > part.backwards
    return torch.where(blind == also, flat + other, torch.where(blind, other, flat))
