"""The name of a block: a hash of everything that its outcome depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from robustkit.bench.execution.resolved_case import ResolvedCase, keep_of
from robustkit.bench.plan.plan import Plan

__all__ = ["block_name"]


def block_name(
    resolved: ResolvedCase,
    plan: Plan,
    rows: range,
    *,
    fingerprints: Mapping[str, str],
    environment: Mapping[str, Any],
    training_hash: str | None,
    lower_block: str | None,
    warm_starts: Sequence[str],
) -> str:
    """The name of a block, 16 hexadecimal digits. The keys that are hashed are fixed: other keys are other names.

    Args:
        resolved: The case.
        plan: The plan, with the hash of the data.
        rows: The images, counted from the offset of the plan.
        fingerprints: The hash of each model's outputs.
        environment: Versions and hardware.
        training_hash: Hash of the images that a universal attack learns from; None for other attacks.
        lower_block: The name of the block that this one starts from, under the next smaller eps; None if there is none.
        warm_starts: Hashes of the runs and files that attacks may start from.
    """
    hashed: dict[str, Any] = {
        "case": asdict(resolved.case),
        "recipe": [repr(resolved.attack), repr(resolved.threat)],
        "data": plan.expected_hashes[plan.data],
        "model": fingerprints[resolved.case.model_under_test],
        "rows": [plan.offset + rows.start, plan.offset + rows.stop],
        "seed": plan.seed,
        "block": plan.block,
        "batch_size": plan.batch_size,
        "device": plan.device,
        "normalize": plan.normalize,
        "save_adversarial": plan.save_adversarial,
        "environment": environment,
    }
    if resolved.attack.minimum_norm:
        hashed["keep"] = keep_of(resolved.attack)
    if training_hash is not None:
        hashed |= {"learned on": training_hash, "models": fingerprints}
    if lower_block is not None:
        hashed["stands on"] = lower_block
    if warm_starts:
        hashed["starts"] = list(warm_starts)
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:16]
