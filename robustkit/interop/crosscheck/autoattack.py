"""Compare AutoAttack with our `Standard` on the same images."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import final

import torch
from rich.console import Group
from rich.text import Text
from torch import Tensor, nn

from robustkit._engine.state_guard import fork_rng
from robustkit.attack import Attack
from robustkit.attacks import Standard
from robustkit.errors import ArgumentError, MissingExtraError
from robustkit.goals import Misclassify
from robustkit.interop.crosscheck.paired_test import LEVEL, mcnemar_p_value
from robustkit.interop.peers import load_autoattack, restore_gradients
from robustkit.target import Target
from robustkit.threats import L1, L2, Linf, Threat

__all__ = [
    "AutoAttackComparison",
    "autoattack_version",
    "compare_with_autoattack",
    "format_autoattack_comparisons",
    "run_autoattack",
    "why_unsupported",
]

_NORMS = ((Linf, "Linf", "linf"), (L2, "L2", "l2"), (L1, "L1", "l1"))  # the name in AutoAttack, and ours
_MIN_CLASSES = 4  # AutoAttack's targeted DLR loss uses the fourth largest logit
_MAX_LISTED = 20  # the largest number of image indices in one line


@final
@dataclass(frozen=True)
class AutoAttackComparison:
    """AutoAttack and an attack of ours on the same images; both results are judged by us.

    An image is solved if it is misclassified, with or without a perturbation inside ball and box.

    Attributes:
        threat: The threat, such as "linf:0.1".
        n: Number of images.
        both: Number of images that both solve.
        only_ours: Indices (from 0) of the images that only our attack solves.
        only_theirs: Indices of the images that only AutoAttack solves.
        neither: Number of images that neither solves.
        rejected: Indices of the images that AutoAttack reports as solved and that are not: outside ball or box, or
            classified correctly.
        p_value: Two-sided p-value of the exact McNemar test on `only_ours` against `only_theirs`.
    """

    threat: str
    n: int
    both: int
    only_ours: tuple[int, ...]
    only_theirs: tuple[int, ...]
    neither: int
    rejected: tuple[int, ...]
    p_value: float

    @property
    def ok(self) -> bool:
        """Whether AutoAttack does not solve significantly more images than we do."""
        return self.p_value >= LEVEL or len(self.only_theirs) < len(self.only_ours)


def autoattack_version() -> str | None:
    """Return the version of pyautoattack; None if it cannot be imported."""
    try:
        load_autoattack()
    except MissingExtraError:
        return None
    return version("pyautoattack")


def why_unsupported(x: Tensor, classes: int, threat: Threat) -> str | None:
    """Return why AutoAttack cannot attack these images (N, ...) in this threat, in one line; None if it can."""
    if not any(isinstance(threat, kind) for kind, *_ in _NORMS):
        return f"AutoAttack supports only linf, l2 and l1, not {type(threat).__name__}"
    if threat.bounds != (0.0, 1.0):
        return f"AutoAttack assumes images in [0, 1], and the threat has bounds={threat.bounds}"
    if isinstance(threat.eps, Tensor):
        return "AutoAttack takes one eps for all images"
    if classes < _MIN_CLASSES:
        return f"AutoAttack needs at least {_MIN_CLASSES} classes for its targeted loss, and the model has {classes}"
    if x.dim() != 4:
        return f"AutoAttack takes images (N, C, H, W), and these have shape {tuple(x.shape)}"
    return None


def run_autoattack(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Run AutoAttack (version "standard") and return its images (N, C, H, W), and which it reports as solved, (N,) bool.

    All images are one batch. With fewer than ten classes its targeted attacks use all of them.

    Raises:
        ArgumentError: AutoAttack does not support the images or the threat.
        MissingExtraError: AutoAttack is not installed.
    """
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    reason = why_unsupported(x, classes, threat)
    if reason is not None:
        raise ArgumentError(f"threat={threat!r}: {reason}")
    norm = next(name for kind, name, _ in _NORMS if isinstance(threat, kind))
    library = load_autoattack()
    with _restore_trace(), fork_rng(seed):
        attack = library.AutoAttack(model, norm=norm, eps=float(threat.eps), seed=seed, device=x.device, version="standard")
        for part in (attack.apgd_targeted, attack.fab):
            part.n_target_classes = min(part.n_target_classes, classes - 1)
        x_adv, predicted = attack.run_standard_evaluation(x.clone(), y.clone(), batch_size=len(x))
    return x_adv.detach(), predicted != y


def compare_with_autoattack(
    model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, ours: Attack | None = None, seed: int = 0
) -> AutoAttackComparison:
    """Compare AutoAttack with an attack of ours, image by image.

    Args:
        model: A classifier, (N, C, H, W) in [0, 1] -> logits (N, K).
        x: Images in [0, 1], (N, C, H, W).
        y: Their classes, (N,) int64.
        threat: The threat model.
        ours: Our attack; default `Standard()`.
        seed: Seed of both attacks.

    Raises:
        ArgumentError: AutoAttack does not support the images or the threat, or there is no image.
        MissingExtraError: AutoAttack is not installed.
    """
    if not len(x):
        raise ArgumentError("x is empty; give at least one image to compare")
    target = Target(model, batch_size=len(x))
    with target.frozen(), restore_gradients(model):
        theirs, claimed = run_autoattack(model, x, y, threat, seed)
    our_result = (Standard() if ours is None else ours)(target, x, y, threat=threat, seed=seed)
    with target.frozen():
        solved, solved_by_autoattack = _solved(model, our_result.x_adv, x, y, threat), _solved(model, theirs, x, y, threat)
    only_ours, only_theirs, rejected = (
        tuple(mask.nonzero().squeeze(1).tolist())
        for mask in (solved & ~solved_by_autoattack, solved_by_autoattack & ~solved, claimed & ~solved_by_autoattack)
    )
    name = next(our_name for kind, _, our_name in _NORMS if isinstance(threat, kind))
    return AutoAttackComparison(
        f"{name}:{threat.eps:.3g}",
        len(x),
        int((solved & solved_by_autoattack).sum()),
        only_ours,
        only_theirs,
        int((~solved & ~solved_by_autoattack).sum()),
        rejected,
        mcnemar_p_value(len(only_ours), len(only_theirs)),
    )


@torch.no_grad()
def _solved(model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """Return which images are inside ball and box and misclassified, (N,) bool."""
    inside = x_adv.isfinite().flatten(1).all(1) & threat.contains(x_adv.to(x.dtype), x)
    return inside & Misclassify().success(model(x_adv.to(x.dtype)), y)


@contextmanager
def _restore_trace() -> Iterator[None]:
    """Restore the trace function: AutoAttack's check for models that change removes it."""
    before = sys.gettrace()
    try:
        yield
    finally:
        sys.settrace(before)


def format_autoattack_comparisons(comparisons: Sequence[AutoAttackComparison]) -> Group:
    """Format comparisons for printing: a line each, then the indices of the images that only one attack solves."""
    lines: list[Text] = []
    for one in comparisons:
        counts = f"both solve {one.both}, only Standard {len(one.only_ours)}, only AutoAttack {len(one.only_theirs)}, neither "
        lines.append(Text(f"{one.threat}, first {one.n:,} images: {counts}{one.neither}; p = {one.p_value:.2g}"))
        for label, images in (
            ("only Standard solves", one.only_ours),
            ("only AutoAttack solves", one.only_theirs),
            ("AutoAttack reports as solved, but are not:", one.rejected),
        ):
            if images:
                lines.append(Text(f"  {label} {_format_indices(images)}"))
    title = Text("AutoAttack (standard) and Standard, both judged by robustkit; p: exact McNemar test", "bold")
    return Group(title, *lines)


def _format_indices(images: Sequence[int]) -> str:
    more = f" and {len(images) - _MAX_LISTED} more" if len(images) > _MAX_LISTED else ""
    return f"image{'' if len(images) == 1 else 's'} {', '.join(map(str, images[:_MAX_LISTED]))}{more}"
