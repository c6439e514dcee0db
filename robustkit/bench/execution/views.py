"""An attack along every view of a target: images that resist it along one view may fall along another."""

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

__all__ = ["attack_every_view", "views_used"]


def views_used(attack: Attack, target: Target) -> tuple[str, ...]:
    """The views that an attack runs along, in order: none if it uses no gradient, only the first if it is universal."""
    views = tuple(target.views) if attack.access == "white" else ()
    return views[:1] if attack.universal else views


def attack_every_view(
    attack: Attack, target: Target, x: Tensor, ref: Tensor, *, ids: Tensor, keep: Keep, starts: Tensor | None, **options: Any
) -> Result:
    """Run an attack along the first view, then along each further view on the unsolved examples.

    If the smallest perturbation is wanted, further views get all examples except those that need no perturbation. Success is
    always judged on the deployed function. Stages of a further view carry its name. Flags of the first view, which the target
    recommends, are flags of the result; those of a further view are notes, because a view without gradient signal does not
    invalidate what another view has found.

    Args:
        attack: The attack.
        target: The target.
        x: The examples, (N, *S).
        ref: What the goal compares with, (N, ...).
        ids: The index of each example, (N,) int64.
        keep: Which point is returned.
        starts: Starting points for the first view, (N, *S), NaN where there is none.
        **options: goal, threat and seed, as the attack takes them.
    """
    result = attack(target, x, ref, ids=ids, keep=keep, starts=starts, **options)
    for view in views_used(attack, target)[1:]:
        needed = ~(result.success & (result.size == 0)) if keep == "smallest" else ~result.success
        rows = needed.nonzero().squeeze(1)
        if len(rows):
            further = _without_audit(attack)(
                target.with_view(view), x[rows], ref[rows], ids=ids[rows.to(ids.device)], keep=keep, **options
            )
            result = _merge(result, rows, further, view)
    return result


def _without_audit(attack: Attack) -> Attack:
    """The attack without the audit of Standard.

    The audit checks the deployed function, which the first view has done; along a view without signal it would escalate.
    """
    return replace(attack, audit=False) if isinstance(attack, Standard) else attack


def _merge(result: Result, rows: Tensor, further: Result, view: str) -> Result:
    """A result, updated with that of some of its examples along another view."""
    better = further.success & (~result.success[rows] | (further.size < result.size[rows]))
    best = {
        name: getattr(result, name).index_copy(
            0,
            rows,
            torch.where(expand_rows(better, getattr(further, name)), getattr(further, name), getattr(result, name)[rows]),
        )
        for name in ("x_adv", "success", "rate", "size")
    }
    costs = {name: getattr(result, name).index_add(0, rows, getattr(further, name)) for name in ("forwards", "backwards")}
    solver = torch.where(better, further.solver + len(result.stages), result.solver[rows])
    new_flags = [flag for flag in further.flags if flag not in result.flags]
    notes = [Message("other-view", f"view {view!r} by itself would raise {flag.name}: {flag.why}") for flag in new_flags]
    return replace(
        result,
        **best,
        **costs,
        flat=result.flat.index_copy(0, rows, _merge_flat(result, rows, further)),
        notes=tuple(dict.fromkeys((*result.notes, *notes, *further.notes))),
        stages=(*result.stages, *(replace(stage, name=f"{stage.name} along {view}") for stage in further.stages)),
        solver=result.solver.index_copy(0, rows, solver),
    )


def _merge_flat(result: Result, rows: Tensor, further: Result) -> Tensor:
    """The number of flat gradients of each example; one has too many only if it has too many along every view."""
    flat, other = result.flat[rows], further.flat
    mostly_flat, other_mostly_flat = 2 * flat > result.backwards[rows], 2 * other > further.backwards
    return torch.where(mostly_flat == other_mostly_flat, flat + other, torch.where(mostly_flat, other, flat))
