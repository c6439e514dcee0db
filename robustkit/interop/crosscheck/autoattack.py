"""AutoAttack and our `Standard` on the same images: who solves which."""

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
from scipy.stats import binomtest
from torch import Tensor, nn

from robustkit._engine.state_guard import fork_rng
from robustkit.attack import Attack
from robustkit.attacks import Standard
from robustkit.errors import ArgumentError, MissingExtraError
from robustkit.goals import Misclassify
from robustkit.interop.peers import load_autoattack, restore_gradients
from robustkit.target import Target
from robustkit.threats import L1, L2, Linf, Threat

__all__ = ["LEVEL", "Duel", "autoattack", "autoattack_version", "duel", "duel_lines", "unserved"]

_NORMS = ((Linf, "Linf", "linf"), (L2, "L2", "l2"), (L1, "L1", "l1"))  # by AutoAttack's name and by ours
LEVEL = 0.001  # below this p-value, two attacks are not equally strong
_FEWEST = 4  # its targeted DLR loss reads the fourth largest logit
_NAMED = 20  # images that are listed by number in one line, at most


@final
@dataclass(frozen=True)
class Duel:
    """AutoAttack and an attack of ours on the same images; what either returns is judged by us.

    Solved is an image that was wrong before, or is wrong after a change inside ball and box.

    Attributes:
        threat: What might change, as "linf:0.1".
        n: How many images.
        both: How many both solve.
        only_ours: Those that we alone solve, by number from 0.
        only_theirs: Those that AutoAttack alone solves, likewise.
        neither: How many nobody solves.
        rejected: Those that AutoAttack calls solved and that are not: outside of ball or box, or right after all.
        p_value: How likely so lopsided a split of those that one alone solves is by chance (exact McNemar test).
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
        """Whether AutoAttack does not solve more than we do by more than chance."""
        return self.p_value >= LEVEL or len(self.only_theirs) < len(self.only_ours)


def autoattack_version() -> str | None:
    """The version of pyautoattack; None where it cannot be imported here."""
    try:
        load_autoattack()
    except MissingExtraError:
        return None
    return version("pyautoattack")


def unserved(x: Tensor, classes: int, threat: Threat) -> str | None:
    """Why AutoAttack cannot be asked about these images (N, ...) and this threat, in one line; None where it can."""
    if not any(isinstance(threat, kind) for kind, *_ in _NORMS):
        return f"AutoAttack knows linf, l2 and l1 alone, not {type(threat).__name__}"
    if threat.bounds != (0.0, 1.0):
        return f"AutoAttack takes every image for one in [0, 1], and here bounds={threat.bounds}"
    if isinstance(threat.eps, Tensor):
        return "AutoAttack takes one eps for all images"
    if classes < _FEWEST:
        return f"AutoAttack needs at least {_FEWEST} classes for its targeted loss, and the model has {classes}"
    if x.dim() != 4:
        return f"AutoAttack takes images (N, C, H, W), and these have shape {tuple(x.shape)}"
    return None


def autoattack(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, seed: int = 0) -> tuple[Tensor, Tensor]:
    """What AutoAttack's standard version returns: its images (N, C, H, W), and which it calls solved, (N,) bool.

    All images go through the model at once. Where there are fewer than ten classes it aims at all that there are.

    Raises:
        ArgumentError: It cannot be asked about this.
        MissingExtraError: It is not installed.
    """
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    why = unserved(x, classes, threat)
    if why is not None:
        raise ArgumentError(f"threat={threat!r}: {why}")
    norm = next(theirs for kind, theirs, _ in _NORMS if isinstance(threat, kind))
    library = load_autoattack()
    with _untraced(), fork_rng(seed):
        attack = library.AutoAttack(model, norm=norm, eps=float(threat.eps), seed=seed, device=x.device, version="standard")
        for part in (attack.apgd_targeted, attack.fab):
            part.n_target_classes = min(part.n_target_classes, classes - 1)
        x_adv, said = attack.run_standard_evaluation(x.clone(), y.clone(), batch_size=len(x))
    return x_adv.detach(), said != y


def duel(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, ours: Attack | None = None, seed: int = 0) -> Duel:
    """AutoAttack against an attack of ours, image by image.

    Args:
        model: A classifier, (N, C, H, W) in [0, 1] -> logits (N, K).
        x: Images in [0, 1], (N, C, H, W).
        y: Their classes, (N,) int64.
        threat: What may change.
        ours: Default `Standard()`.
        seed: Of both.

    Raises:
        ArgumentError: AutoAttack cannot be asked about this, or there is no image.
        MissingExtraError: It is not installed.
    """
    if not len(x):
        raise ArgumentError("x is empty; there is nothing to compare: give at least one image")
    target = Target(model, batch_size=len(x))
    with target.frozen(), restore_gradients(model):
        theirs, claimed = autoattack(model, x, y, threat, seed)
    mine = (Standard() if ours is None else ours)(target, x, y, threat=threat, seed=seed)
    with target.frozen():
        won, lost = _solved(model, mine.x_adv, x, y, threat), _solved(model, theirs, x, y, threat)
    alone = [tuple(side.nonzero().squeeze(1).tolist()) for side in (won & ~lost, lost & ~won, claimed & ~lost)]
    split = len(alone[0]), len(alone[1])
    p_value = float(binomtest(split[0], sum(split)).pvalue) if sum(split) else 1.0
    name = next(ours_name for kind, _, ours_name in _NORMS if isinstance(threat, kind))
    return Duel(
        f"{name}:{threat.eps:.3g}",
        len(x),
        int((won & lost).sum()),
        alone[0],
        alone[1],
        int((~won & ~lost).sum()),
        alone[2],
        p_value,
    )


@torch.no_grad()
def _solved(model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """Which images are inside ball and box and not taken for what they are, (N,) bool."""
    inside = x_adv.isfinite().flatten(1).all(1) & threat.contains(x_adv.to(x.dtype), x)
    return inside & Misclassify().success(model(x_adv.to(x.dtype)), y)


@contextmanager
def _untraced() -> Iterator[None]:
    """AutoAttack's check for changing models ends all tracing; whoever traced before goes on after it."""
    before = sys.gettrace()
    try:
        yield
    finally:
        sys.settrace(before)


def duel_lines(duels: Sequence[Duel]) -> Group:
    """The duels to be printed: one line each, then those images that one alone solves, by number."""
    told: list[Text] = []
    for one in duels:
        counts = f"both solve {one.both}, only Standard {len(one.only_ours)}, only AutoAttack {len(one.only_theirs)}, nobody "
        told.append(Text(f"{one.threat}, first {one.n:,} images: {counts}{one.neither}; p = {one.p_value:.2g}"))
        for who, images in (
            ("only Standard solves", one.only_ours),
            ("only AutoAttack solves", one.only_theirs),
            ("AutoAttack calls solved, and we do not:", one.rejected),
        ):
            if images:
                told.append(Text(f"  {who} {_numbers(images)}"))
    title = Text("AutoAttack (standard) beside Standard, both judged here; p: exact McNemar test of who solves more", "bold")
    return Group(title, *told)


def _numbers(images: Sequence[int]) -> str:
    more = f" and {len(images) - _NAMED} more" if len(images) > _NAMED else ""
    return f"image{'' if len(images) == 1 else 's'} {', '.join(map(str, images[:_NAMED]))}{more}"
