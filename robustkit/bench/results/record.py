"""One row of results.json: what was asked, what came out, and what may be said of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustkit._engine.ledger import Message
from robustkit.attack import FLAT_GRADIENTS, Attack, flat_flag
from robustkit.bench.plan.plan import Case, Plan
from robustkit.bench.plan.specs import number
from robustkit.bench.results.curves import Curve, against_cost, against_eps
from robustkit.bench.statistics.intervals import wilson
from robustkit.errors import ArgumentError
from robustkit.flags import FLAGS, NOTES, flags_and_notes
from robustkit.result import Result

__all__ = ["Record", "make_record", "surviving", "worst_case"]

Record = dict[str, Any]  # Any: strings, numbers, and lists of these, ready for JSON

_UNTARGETED = "misclassify"


def make_record(
    case: Case,
    plan: Plan,
    *,
    attack: Attack,
    result: Result,
    clean: NDArray[np.bool_],
    robust: NDArray[np.bool_],
    seconds: float,
    model_hash: str,
) -> Record:
    """The record of a case. Rates are over all images; `median_size` is over those on which the attack succeeded.

    An image on which the model was wrong anyway counts as a success of size 0 where the goal is to be wrong. Without any
    success `median_size` is None.

    Args:
        case: What was asked.
        plan: The run that it belongs to; it knows the hash of the data.
        attack: What ran; its repr, with every field, stands in the record, since defaults may change.
        result: Of all blocks together; its images are not looked at.
        clean: Which images are classified correctly without an attack, (N,).
        robust: Which are classified correctly both before and after, (N,).
        seconds: What the blocks took, one after another.
        model_hash: Of the weights.
    """
    n = len(clean)
    low, high = wilson(int(robust.sum()), n)
    sizes = result.size[result.success]
    # Told of the whole case: the blocks have said it of a hundred images each.
    flat, (alarms, facts) = flat_flag(result), flags_and_notes(result.checks)
    again = {FLAT_GRADIENTS, *(sign.name for sign in (*FLAGS, *NOTES))}
    flags = _once((*(flag for flag in result.flags if flag.name not in again), *flat, *alarms))
    notes = _once((*(note for note in result.notes if note.name not in again), *([] if flat else _flat_note(result)), *facts))
    return {
        "model": case.model,
        "data": plan.data,
        "defence": case.defended,
        "goal": case.goal,
        "threat": case.threat,
        "attack": case.attack,
        "recipe": repr(attack),
        "seed": plan.seed,
        "n": n,
        "clean_accuracy": float(clean.mean()),
        "robust_accuracy": float(robust.mean()),
        "success_rate": float(result.success.double().mean()),
        "low": low,
        "high": high,
        "median_size": float(sizes.quantile(0.5)) if len(sizes) else None,
        "forwards": int(result.forwards.sum()),
        "backwards": int(result.backwards.sum()),
        "seconds": seconds,
        "access": attack.access,
        "flags": flags,
        "notes": notes,
        "model_hash": model_hash,
        "data_hash": plan.expected_hashes.get(plan.data),
        **_curves(case, attack, result, clean, robust),
        "stages": [asdict(stage) for stage in result.stages],
        "checks": [asdict(one) for one in result.checks],
    }


def _curves(
    case: Case, attack: Attack, result: Result, clean: NDArray[np.bool_], robust: NDArray[np.bool_]
) -> dict[str, Curve | None]:
    """The curve against eps of an attack that looks for the smallest change, that against the cost of any other.

    Neither where the goal is another than to be wrong, or where one change serves all images.
    """
    curves: dict[str, Curve | None] = {"against_cost": None, "against_eps": None}
    if case.goal != _UNTARGETED or attack.universal:
        return curves
    if not attack.minimum_norm:  # one that does goes on after its first success: its costs tell nothing
        return curves | {"against_cost": against_cost(result, clean, robust)}
    norm, _, text = case.threat.partition(":")
    try:
        eps = number(text, "eps")
    except ArgumentError:  # a threat from Python that the command line has no words for
        return curves
    return curves | {"against_eps": against_eps(result, clean, robust, eps, whole=norm == "pixels")}


def surviving(masks: Sequence[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    """The images that survive every attack of several that was tried on them, (N,) bool.

    A universal attack that has learned on the first images of the data is scored on the rest alone. The first ones then
    count by the other attacks, so that an attack more can never make the share of survivors larger.
    """
    survived = np.ones(max(len(mask) for mask in masks), np.bool_)
    for mask in masks:
        survived[len(survived) - len(mask) :] &= mask
    return survived


def worst_case(survivors: Sequence[tuple[Record, NDArray[np.bool_]]]) -> list[Record]:
    """For each model and threat, the images that survive every attack that was run: never more than under the best one.

    Args:
        survivors: Each record with the images, (N,) bool, that were right before and after its attack. Attacks with
            another goal count too: an image that they have made wrong is wrong.

    Returns:
        Records of their own: model, data, defence, threat, n, attacks, clean_accuracy, robust_accuracy, low, high.
    """
    keys = ("model", "data", "defence", "threat")
    groups: dict[tuple[str, ...], list[tuple[Record, NDArray[np.bool_]]]] = {}
    for record, robust in survivors:
        groups.setdefault(tuple(record[key] for key in keys), []).append((record, robust))
    found = []
    for group, members in groups.items():
        robust = surviving([survived for _, survived in members])
        most = max(members, key=lambda member: len(member[1]))[0]
        low, high = wilson(int(robust.sum()), len(robust))
        attacks = [f"{record['attack']} ({record['goal']})" for record, _ in members]
        found.append(
            {
                **dict(zip(keys, group, strict=True)),
                "n": len(robust),
                "attacks": attacks,
                "clean_accuracy": most["clean_accuracy"],
                "robust_accuracy": float(robust.mean()),
                "low": low,
                "high": high,
            }
        )
    return found


def _once(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Each name once with its first evidence, and how often it was found with other evidence."""
    found: dict[str, list[Message]] = {}
    for message in messages:
        found.setdefault(message.name, []).append(message)
    more = {name: f" (and {len(all_) - 1} more like it)" if len(all_) > 1 else "" for name, all_ in found.items()}
    return [asdict(Message(name, all_[0].why + more[name])) for name, all_ in found.items()]


def _flat_note(result: Result) -> list[Message]:
    """Gradients without signal, where more than one in a hundred queries gave one."""
    asked, flat = int(result.backwards.sum()), int(result.flat.sum())
    if flat <= asked / 100:
        return []
    images = int((result.flat > 0).sum())
    return [Message(FLAT_GRADIENTS, f"{flat / asked:.1%} of the gradient queries were zero or not finite, on {images} images")]
