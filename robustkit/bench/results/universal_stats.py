"""What a universal perturbation does to the predictions of the images that are scored, and of other models."""

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
    """What a universal perturbation does to the predictions for the images of a block.

    Attributes:
        before: The classes that the model names without it, (n,) int64.
        after: The classes that it names with it, (n,) int64.
        random: The share of random-sign changes of the same budget that change the class, (n,) float64.
        elsewhere: For each other model of the run, whether its class changes, (n,) bool.
        delta: The change itself, (C, H, W) or whatever an input is; with the first block of a case only.
        learned: What is to be told of the learning; likewise.
    """

    before: Tensor
    after: Tensor
    random: Tensor
    elsewhere: Mapping[str, Tensor] = field(default_factory=dict)
    delta: Tensor | None = None
    learned: Mapping[str, Any] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is a tensor, by name, for a file."""
        held = {f"spread/{name}": getattr(self, name) for name in ("before", "after", "random")}
        held |= {} if self.delta is None else {"spread/delta": self.delta}
        return held | {f"elsewhere/{model}": fooled for model, fooled in self.elsewhere.items()}

    @classmethod
    def of(cls, held: Mapping[str, Tensor], learned: Mapping[str, Any] | None) -> UniversalStats | None:
        """What `tensors` gave, or None where there is nothing of it."""
        if "spread/before" not in held:
            return None
        elsewhere = {name.removeprefix("elsewhere/"): held[name] for name in sorted(held) if name.startswith("elsewhere/")}
        before, after, random = (held[f"spread/{name}"] for name in ("before", "after", "random"))
        return cls(before, after, random, elsewhere, held.get("spread/delta"), learned)


def universal_facts(
    record: Record, spreads: Sequence[UniversalStats], labels: Tensor, classes: Sequence[str]
) -> dict[str, Any]:
    """What a record tells of a universal attack besides: rates over all images of its blocks, in [0, 1], and the learning.

    `fooling_train` and `fooling_held_out` are the shares of predictions that change, right or wrong before, on the images
    that the change was learned on and on the others; `fooling_random` the same for random signs of the same budget;
    `collapse` the class into which most of the changed predictions fall, and their share of them; `transfer` the share of
    changed predictions of every other model of the run.
    """
    learned = next(spread.learned for spread in spreads if spread.learned is not None)
    before, after, random = (torch.cat([getattr(spread, name) for spread in spreads]) for name in ("before", "after", "random"))
    fooled = before != after
    into = np.bincount(after[fooled].numpy()) if fooled.any() else np.zeros(0, np.int64)
    most = int(into.argmax()) if len(into) else None
    held_out, yardstick = float(fooled.double().mean()), float(random.mean())
    why = (
        f"one change for all, learned on {learned['images']:,} images of {learned['source']}, none of those scored; it changes "
        f"{learned['fooling_train']:.1%} of the predictions there, {held_out:.1%} here; random signs {yardstick:.1%}"
    )
    return {
        "seconds": record["seconds"] + learned["seconds"],
        "forwards": record["forwards"] + learned["forwards"],
        "backwards": record["backwards"] + learned["backwards"],
        "flags": [*record["flags"], *learned["flags"], *_other_classes(learned["classes"], labels)],
        "notes": [*record["notes"], {"name": "universal", "why": why}],
        "fooling_train": learned["fooling_train"],
        "fooling_held_out": held_out,
        "fooling_random": yardstick,
        "collapse": None
        if most is None
        else {
            "class": classes[most] if most < len(classes) else str(most),
            "share": float(into[most] / into.sum()),
        },
        "transfer": {
            model: float(torch.cat([spread.elsewhere[model] for spread in spreads]).double().mean())
            for model in spreads[0].elsewhere
        },
    }


def _other_classes(learned: Sequence[int], labels: Tensor) -> list[dict[str, str]]:
    """An alarm where images of some classes are scored that the change has never seen, as where data are sorted."""
    scored = set(np.unique(labels.numpy()).tolist())
    unseen = len(scored - set(learned))
    if not unseen:
        return []
    why = f"{unseen} of the {len(scored)} classes that are scored were not among the images it learned on; shuffle the data"
    return [{"name": "learned-on-other-classes", "why": why}]
