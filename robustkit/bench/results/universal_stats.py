"""The effect of a universal perturbation on the predictions of the attacked model and of other models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from robustkit.bench.results.record import Record

__all__ = ["UniversalStats", "universal_facts"]


@final
@dataclass(frozen=True, eq=False)
class UniversalStats:
    """Predictions with and without a universal perturbation, for the images of a block.

    Attributes:
        before: The predicted classes without the perturbation, (n,) int64.
        after: The predicted classes with it, (n,) int64.
        random: The fraction of random-sign perturbations of the same eps that change the prediction, (n,) float64.
        other_models: For each other model of the run, whether its prediction changes, (n,) bool.
        delta: The perturbation, (*S); only in the first block of a case.
        learned: How it was learned (`LearnedPerturbation.facts`); only in the first block of a case.
    """

    before: Tensor
    after: Tensor
    random: Tensor
    other_models: Mapping[str, Tensor] = field(default_factory=dict)
    delta: Tensor | None = None
    learned: Mapping[str, Any] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, for a block file."""
        tensors = {f"spread/{name}": getattr(self, name) for name in ("before", "after", "random")}
        tensors |= {} if self.delta is None else {"spread/delta": self.delta}
        return tensors | {f"elsewhere/{model}": fooled for model, fooled in self.other_models.items()}

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor], learned: Mapping[str, Any] | None) -> UniversalStats | None:
        """The inverse of `tensors`; None if the block is not of a universal attack."""
        if "spread/before" not in stored:
            return None
        prefix = "elsewhere/"
        other_models = {name.removeprefix(prefix): stored[name] for name in sorted(stored) if name.startswith(prefix)}
        before, after, random = (stored[f"spread/{name}"] for name in ("before", "after", "random"))
        return cls(before, after, random, other_models, stored.get("spread/delta"), learned)


def universal_facts(record: Record, blocks: Sequence[UniversalStats], labels: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """The fields of a record that are different for a universal attack, or that only a universal attack has.

    All rates are in [0, 1]. `fooling_train` and `fooling_held_out`: the fraction of predictions that change, whether they were
    correct or not, on the training images and on the scored images. `fooling_random`: the same for random signs with the same
    eps. `collapse`: the most frequent class among the changed predictions, and its share of them. `transfer`: the fraction of
    changed predictions for each other model of the run.

    Args:
        record: The record of the case.
        blocks: The statistics of its blocks.
        labels: The true classes of the scored images, (N,).
        classes: The names of the classes.
    """
    learned = next(block.learned for block in blocks if block.learned is not None)
    before, after, random = (torch.cat([getattr(block, name) for block in blocks]) for name in ("before", "after", "random"))
    fooled = before != after
    counts = np.bincount(after[fooled].numpy()) if fooled.any() else np.zeros(0, np.int64)
    dominant = int(counts.argmax()) if len(counts) else None
    fooling_held_out, fooling_random = float(fooled.double().mean()), float(random.mean())
    why = (
        f"one perturbation for all images, learned on {learned['images']:,} other images ({learned['source']}); it changes "
        f"{learned['fooling_train']:.1%} of the predictions there, {fooling_held_out:.1%} on the scored images; random signs "
        f"change {fooling_random:.1%}"
    )
    return {
        "seconds": record["seconds"] + learned["seconds"],
        "forwards": record["forwards"] + learned["forwards"],
        "backwards": record["backwards"] + learned["backwards"],
        "flags": [*record["flags"], *learned["flags"], *_other_classes(learned["classes"], labels)],
        "notes": [*record["notes"], {"name": "universal", "why": why}],
        "fooling_train": learned["fooling_train"],
        "fooling_held_out": fooling_held_out,
        "fooling_random": fooling_random,
        "collapse": None
        if dominant is None
        else {
            "class": classes[dominant] if dominant < len(classes) else str(dominant),
            "share": float(counts[dominant] / counts.sum()),
        },
        "transfer": {
            model: float(torch.cat([block.other_models[model] for block in blocks]).double().mean())
            for model in blocks[0].other_models
        },
    }


def _other_classes(learned: Sequence[int], labels: Tensor) -> list[dict[str, str]]:
    """A flag if images of classes are scored that are missing from the training images, as happens with sorted data."""
    scored = set(np.unique(labels.numpy()).tolist())
    unseen = len(scored - set(learned))
    if not unseen:
        return []
    why = f"{unseen} of the {len(scored)} scored classes are missing from the training images; shuffle the data"
    return [{"name": "learned-on-other-classes", "why": why}]
