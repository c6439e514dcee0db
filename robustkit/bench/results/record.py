"""The records of results.json: the settings and the results of a case, and the worst case over attacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustkit._engine.ledger import Message
from robustkit.attack import FLAT_GRADIENTS, Attack, flat_flag
from robustkit.bench.plan.plan import UNTARGETED, Case, Plan
from robustkit.bench.plan.specs import number
from robustkit.bench.results.curves import Curve, against_cost, against_eps
from robustkit.bench.statistics.intervals import wilson
from robustkit.errors import ArgumentError
from robustkit.flags import FLAGS, NOTES, flags_and_notes
from robustkit.result import Result

__all__ = ["Record", "make_record", "robust_to_all", "worst_case"]

Record = dict[str, Any]  # Any: strings, numbers, and lists of these, for JSON


def make_record(
    case: Case,
    plan: Plan,
    *,
    attack: Attack,
    result: Result,
    correct: NDArray[np.bool_],
    robust: NDArray[np.bool_],
    seconds: float,
    model_hash: str,
) -> Record:
    """The record of a case. Rates are over all images; `median_size` is over those on which the attack succeeded.

    If the goal is misclassification, an image that is misclassified without an attack counts as a success of size 0. Without
    any success `median_size` is None.

    Args:
        case: The case.
        plan: The plan of the run, with the hash of the data.
        attack: The attack. The record has its repr with all fields, because defaults may change.
        result: The result of all blocks; its images are not used.
        correct: Which images are classified correctly without an attack, (N,).
        robust: Which images are classified correctly both before and after the attack, (N,).
        seconds: The total time of the blocks.
        model_hash: The hash of the weights.
    """
    n = len(correct)
    low, high = wilson(int(robust.sum()), n)
    sizes = result.size[result.success]
    # These rules are applied again to the whole case, because each block has applied them to its own images.
    flat, (diagnostic_flags, diagnostic_notes) = flat_flag(result), flags_and_notes(result.checks)
    replaced = {FLAT_GRADIENTS, *(rule.name for rule in (*FLAGS, *NOTES))}
    flags = _merge((*(flag for flag in result.flags if flag.name not in replaced), *flat, *diagnostic_flags))
    flat_note = [] if flat else _flat_note(result)
    notes = _merge((*(note for note in result.notes if note.name not in replaced), *flat_note, *diagnostic_notes))
    return {
        "model": case.model,
        "data": plan.data,
        "defence": case.defence_or_none,
        "goal": case.goal,
        "threat": case.threat,
        "attack": case.attack,
        "recipe": repr(attack),
        "seed": plan.seed,
        "n": n,
        "clean_accuracy": float(correct.mean()),
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
        **_curves(case, attack, result, correct, robust),
        "stages": [asdict(stage) for stage in result.stages],
        "checks": [asdict(check) for check in result.checks],
    }


def _curves(
    case: Case, attack: Attack, result: Result, correct: NDArray[np.bool_], robust: NDArray[np.bool_]
) -> dict[str, Curve | None]:
    """The curve against eps for a minimum-norm attack, the curve against cost for any other.

    There are no curves for goals other than misclassification, or for universal attacks.
    """
    curves: dict[str, Curve | None] = {"against_cost": None, "against_eps": None}
    if case.goal != UNTARGETED or attack.universal:
        return curves
    if not attack.minimum_norm:  # a minimum-norm attack continues after its first success, so its cost is not informative
        return curves | {"against_cost": against_cost(result, correct, robust)}
    norm, _, text = case.threat.partition(":")
    try:
        eps = number(text, "eps")
    except ArgumentError:  # a threat given in Python for which there is no spec
        return curves
    return curves | {"against_eps": against_eps(result, correct, robust, eps, integers=norm == "pixels")}


def robust_to_all(masks: Sequence[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    """The images that are robust to the union of several attacks, (N,) bool.

    A universal attack that learned on the first images is scored on the others only. The first images are then decided by the
    other attacks, so that an additional attack never increases robust accuracy.

    Args:
        masks: For each attack, which of the last images are robust to it, (n,) bool with n <= N.
    """
    robust = np.ones(max(len(mask) for mask in masks), np.bool_)
    for mask in masks:
        robust[len(robust) - len(mask) :] &= mask
    return robust


def worst_case(cases: Sequence[tuple[Record, NDArray[np.bool_]]]) -> list[Record]:
    """The robust accuracy under the union of all attacks that were run, for each model and threat.

    Args:
        cases: Each record, with the images that are classified correctly before and after its attack, (N,) bool. Attacks with
            other goals count too: an image that they make misclassified is misclassified.

    Returns:
        Records with the keys model, data, defence, threat, n, attacks, clean_accuracy, robust_accuracy, low and high.
    """
    keys = ("model", "data", "defence", "threat")
    groups: dict[tuple[str, ...], list[tuple[Record, NDArray[np.bool_]]]] = {}
    for record, robust in cases:
        groups.setdefault(tuple(record[key] for key in keys), []).append((record, robust))
    rows = []
    for group, members in groups.items():
        robust = robust_to_all([mask for _, mask in members])
        most_images = max(members, key=lambda member: len(member[1]))[0]
        low, high = wilson(int(robust.sum()), len(robust))
        attacks = [f"{record['attack']} ({record['goal']})" for record, _ in members]
        rows.append(
            {
                **dict(zip(keys, group, strict=True)),
                "n": len(robust),
                "attacks": attacks,
                "clean_accuracy": most_images["clean_accuracy"],
                "robust_accuracy": float(robust.mean()),
                "low": low,
                "high": high,
            }
        )
    return rows


def _merge(messages: Sequence[Message]) -> list[dict[str, str]]:
    """One message per name, with its first reason and the number of further ones."""
    by_name: dict[str, list[Message]] = {}
    for message in messages:
        by_name.setdefault(message.name, []).append(message)
    suffixes = {name: f" (and {len(group) - 1} more like it)" if len(group) > 1 else "" for name, group in by_name.items()}
    return [asdict(Message(name, group[0].why + suffixes[name])) for name, group in by_name.items()]


def _flat_note(result: Result) -> list[Message]:
    """A note on gradients without signal, if more than one in a hundred gradient queries gave one."""
    queries, flat = int(result.backwards.sum()), int(result.flat.sum())
    if flat <= queries / 100:
        return []
    images = int((result.flat > 0).sum())
    why = f"{flat / queries:.1%} of the gradient queries were zero or not finite, on {images} images"
    return [Message(FLAT_GRADIENTS, why)]
