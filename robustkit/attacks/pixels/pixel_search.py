"""A search over single pixels that asks where the answers so far promise most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from robustkit._engine.field_checks import at_least
from robustkit.attacks.pixels._locations import EffectMap, answers, extremes, painted
from robustkit.attacks.pixels._pixel_attack import PixelAttack
from robustkit.problem import Problem

__all__ = ["PixelSearch"]

_FINALISTS = 4  # locations at which all extreme colours are tried, for one pixel
_TRIED = -1e300  # the promise of a candidate that was asked before
_SHELF = 32  # promising locations among which a search that is stuck draws a new set


@final
@dataclass(frozen=True)
class PixelSearch(PixelAttack):
    """Black and white pixels where they promise most, learned from all answers so far; other extreme colours at the end.

    One pixel: black and white on a coarse grid; then, a few at a time, the candidates of the largest promise; with the last
    quarter of the queries the other extreme colours: all of them at the best four locations, then those that did well there
    at the next ones (no such quarter where there is one channel). The promise of a candidate is the effect that answers at
    nearby locations let expect of it, plus a bonus where there are few answers: what a pixel does changes slowly over an
    image.

    Several pixels: the best of a coarse grid together; then one of them after the other is taken out, and the best of those
    that promise most takes its place if that lowers the loss. Where a round through all of them changes nothing, the whole
    set is drawn anew among the most promising locations. At last each pixel is tried in the other extreme colours.

    All images are asked the same number of questions between two looks at the answers, so that no result depends on what
    else is in the batch; an image leaves at its first success.

    Attributes:
        pixels: How many pixels are changed at most; None for as many as the threat allows. An image whose own budget is
            smaller keeps to that.
        queries: The most forwards that an image costs, for each pixel that it may change: three pixels may cost three times
            as many. At least 3; what judges the result comes on top.
        at_once: How many candidates are asked about between two looks at the answers.

    Source: our own. That extreme colours are enough: Croce & Hein 2019, "Sparse and imperceivable adversarial attacks",
        section 3 (CornerSearch, https://arxiv.org/abs/1909.05040); there all locations and corners are asked, and several
        pixels are drawn by the rank of the single ones. Replacing few pixels at a time: Sparse-RS (see `SparseRS`).
    """

    queries: int = 600
    at_once: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(3, queries=self.queries)
        at_least(1, at_once=self.at_once)

    def search(self, problem: Problem, count: int) -> Tensor:
        """One search for all images, in step."""
        return _Search(problem, count, count * self.queries, self.at_once).run()


@final
class _Search:
    """Sets of `count` pixels, one for each of some images; those that are solved are forgotten on the way."""

    def __init__(self, problem: Problem, count: int, queries: int, at_once: int) -> None:
        x = problem.x
        self._x_adv, self._rows = x.clone(), torch.arange(len(x), device=x.device)
        self._problem, self._count, self._left, self._at_once = problem, count, queries, at_once
        self._field, self._colours = EffectMap(x, problem.threat), extremes(x, problem.threat)
        self._locations = x.shape[2] * x.shape[3]
        # The pixels of each set by their locations and the numbers of their colours, and the loss with all of them.
        self._places = torch.arange(count, device=x.device).repeat(len(x), 1)
        self._tints = torch.zeros_like(self._places)
        self._value, self._lowest, self._single = torch.full((3, len(x)), torch.inf, dtype=torch.float64, device=x.device)
        # What was tried in each slot beside the others as they are, and how many refills in a row changed nothing.
        self._tried = torch.zeros(len(x), count, 2 * self._locations, dtype=torch.bool, device=x.device)
        self._idle = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self._untried = 2 * self._locations  # of one pixel; sets of several there are more of than can be tried

    def run(self) -> Tensor:
        """The sets of lowest loss that were seen painted on the images, (N, C, H, W)."""
        further = len(self._colours) - 2
        spare = further * self._count if self._count > 1 else self._left // 4 * (further > 0)
        self._begin()
        turn = 0
        while self._left > spare + (self._count > 1) and self._untried and self._somebody_left():
            self._kick(turn)
            self._refill(turn % self._count, self._left - spare)
            turn += 1
        if further and self._left > 0 and self._somebody_left():
            if self._count > 1:
                self._recolour(further)
            else:
                self._other_colours(further)
        return self._x_adv

    def _somebody_left(self) -> bool:
        """Forget the images that are solved, and say whether there are others."""
        still = self._problem.unsolved
        if not still.all():
            self._problem, self._rows = self._problem[still], self._rows[still]
            self._field.narrow(still)
            self._places, self._tints, self._single = self._places[still], self._tints[still], self._single[still]
            self._value, self._lowest = self._value[still], self._lowest[still]
            self._tried, self._idle = self._tried[still], self._idle[still]
        return len(self._rows) > 0

    def _begin(self) -> None:
        """A coarse grid of single pixels, and the best of them together."""
        self._single = self._ask(1, lambda rows, _: self._problem.x[rows])[:, 0]
        nobody = self._places[:, :0]
        candidates = self._field.grid(both=self._count == 1)[:, : self._left - (self._count > 1)]
        losses = self._try(candidates, nobody, nobody, self._single)
        if self._count == 1:
            self._tried[:, 0].scatter_(1, candidates, True)
            self._take(0, candidates, losses)
            self._untried -= candidates.shape[1]
            return
        effect, tint = self._field.seen.reshape(len(losses), 2, -1).max(1)
        self._places = effect.argsort(dim=1, descending=True, stable=True)[:, : self._count]
        self._tints = tint.gather(1, self._places)
        self._value = self._ask(1, lambda rows, _: self._set(rows))[:, 0]
        self._note()

    def _refill(self, slot: int, most: int) -> None:
        """Take the pixel of one slot out of each set, and ask about those that promise most in its place."""
        kept = [i for i in range(self._count) if i != slot]
        places, tints = self._places[:, kept], self._tints[:, kept]
        # What was tried comes last, and what must not be asked at all after that.
        acquisition = self._field.acquisition().masked_fill(self._tried[:, slot], _TRIED)
        without = self._single
        if kept:
            for shift in (0, self._locations):
                acquisition.scatter_(1, places + shift, -torch.inf)
            self._leave_out_own(acquisition, slot)
            without = self._ask(1, lambda rows, _: self._paint(rows, places[rows], tints[rows]))[:, 0]
        many = min(self._at_once, most - bool(kept), 2 * (self._locations - len(kept)) - bool(kept), self._untried)
        candidates = acquisition.argsort(dim=1, descending=True, stable=True)[:, :many]
        losses = self._try(candidates, places, tints, without)
        self._tried[:, slot].scatter_(1, candidates, True)
        better = self._take(slot, candidates, losses)
        self._idle = torch.where(better, 0, self._idle + 1)
        self._untried -= many if self._count == 1 else 0
        self._tried[:, kept] &= ~better[:, None, None]

    def _leave_out_own(self, acquisition: Tensor, slot: int) -> None:
        """Forbid the pixel that stands in the slot: its loss is known, and told in another batch it may be a rounding lower.

        A set that was drawn anew has not been asked about yet, so there it may come back.
        """
        own = (self._places[:, slot] + self._tints[:, slot] * self._locations).unsqueeze(1)
        there = acquisition.gather(1, own)
        acquisition.scatter_(1, own, torch.where(self._value.isfinite().unsqueeze(1), -torch.inf, there))

    def _kick(self, turn: int) -> None:
        """Draw a set anew among the promising locations where a round through all its pixels changed nothing."""
        shelf = min(_SHELF, self._locations)
        stuck = (self._idle >= self._count).nonzero().squeeze(1)
        if self._count == 1 or shelf <= self._count or not len(stuck):
            return
        noise = self._problem[stuck].noise("anew", turn)
        acquisition, tint = self._field.acquisition()[stuck].reshape(len(stuck), 2, -1).max(1)
        best = acquisition.argsort(dim=1, descending=True, stable=True)[:, :shelf]
        draw = noise.at("place").uniform(shelf).argsort(dim=1, stable=True)[:, : self._count]
        self._places[stuck] = best.gather(1, draw)
        # One in four in the colour that promises less: what counts beside others may not show in single pixels.
        other = (noise.at("colour").uniform(self._count) < 0.25).long()
        self._tints[stuck] = (tint.gather(1, self._places[stuck]) + other) % 2
        self._value[stuck], self._tried[stuck], self._idle[stuck] = torch.inf, False, 0

    def _recolour(self, further: int) -> None:
        """The other extreme colours for one pixel of each set after the other."""
        for slot in range(self._count):
            tints = 2 + torch.arange(min(further, max(0, self._left)), device=self._tints.device)
            if not len(tints):
                return

            def points(rows: Tensor, some: slice, slot: int = slot, tints: Tensor = tints) -> Tensor:
                many = len(tints[some])
                changed = self._tints[rows].repeat_interleave(many, 0)
                changed[:, slot] = tints[some].repeat(len(rows))
                return self._paint(rows.repeat_interleave(many), self._places[rows].repeat_interleave(many, 0), changed)

            value, best = self._ask(len(tints), points).min(1)
            better = value < self._value
            self._tints[:, slot] = torch.where(better, tints[best], self._tints[:, slot])
            self._value = torch.where(better, value, self._value)
            self._note()

    def _other_colours(self, further: int) -> None:
        """The other extreme colours at the best locations, then the colours that did well there at the next ones."""
        seen = self._field.seen.reshape(len(self._rows), 2, -1).amax(1)
        tints = torch.arange(further, device=seen.device)
        many = min(_FINALISTS, self._locations, max(1, self._left // further))
        first = seen.argsort(dim=1, descending=True, stable=True)[:, :many]
        numbers = (tints * self._locations + first.unsqueeze(2)).flatten(1)[:, : self._left]
        losses = self._dye(numbers)
        effects = self._single.unsqueeze(1) - losses
        effects = torch.where(effects.isfinite(), effects, 0).clamp(min=0)
        lean = torch.zeros(len(seen), further, dtype=seen.dtype, device=seen.device)
        lean = lean.scatter_add(1, numbers // self._locations, effects)
        # Locations without any answer come after those with a poor one, and nothing is asked twice.
        strength = torch.where(seen.isfinite(), seen.clamp(min=0), -1).unsqueeze(1)
        score = torch.where(strength < 0, strength, lean.unsqueeze(2) * strength).flatten(1)
        rest = min(self._left, further * self._locations - numbers.shape[1])
        if rest > 0:
            score = score.scatter(1, numbers, -torch.inf)
            self._dye(score.argsort(dim=1, descending=True, stable=True)[:, :rest])

    def _dye(self, numbers: Tensor) -> Tensor:
        """The losses with single pixels in the other extreme colours, numbered colour by colour, (N, M)."""
        places, tints = numbers % self._locations, numbers // self._locations + 2

        def points(rows: Tensor, some: slice) -> Tensor:
            many = rows.repeat_interleave(some.stop - some.start)
            return self._paint(many, places[rows, some].reshape(-1, 1), tints[rows, some].reshape(-1, 1))

        losses = self._ask(numbers.shape[1], points)
        value, best = losses.min(1, keepdim=True)
        better = value < self._value.unsqueeze(1)
        self._places = torch.where(better, places.gather(1, best), self._places)
        self._tints = torch.where(better, tints.gather(1, best), self._tints)
        self._value = torch.minimum(value.squeeze(1), self._value)
        self._note()
        return losses

    def _try(self, candidates: Tensor, places: Tensor, tints: Tensor, without: Tensor) -> Tensor:
        """The losses with each candidate (N, M) beside the pixels of `places` and `tints`; the field learns from them."""

        def points(rows: Tensor, some: slice) -> Tensor:
            tried = candidates[rows, some].reshape(-1, 1)
            rows = rows.repeat_interleave(some.stop - some.start)
            where = torch.cat([places[rows], tried % self._locations], 1)
            return self._paint(rows, where, torch.cat([tints[rows], tried // self._locations], 1))

        losses = self._ask(candidates.shape[1], points)
        effects = without.unsqueeze(1) - losses
        self._field.learn(candidates, torch.where(effects.isfinite(), effects, 0))
        return losses

    def _take(self, slot: int, candidates: Tensor, losses: Tensor) -> Tensor:
        """Put the best candidate into the slot where that lowers the loss of the set; says where, (N,) bool."""
        value, best = losses.min(1)
        better: Tensor = value < self._value
        chosen = candidates.gather(1, best.unsqueeze(1)).squeeze(1)
        self._places[:, slot] = torch.where(better, chosen % self._locations, self._places[:, slot])
        self._tints[:, slot] = torch.where(better, chosen // self._locations, self._tints[:, slot])
        self._value = torch.where(better, value, self._value)
        self._note()
        return better

    def _note(self) -> None:
        """Keep the sets of lowest loss for the end."""
        new = (self._value < self._lowest).nonzero().squeeze(1)
        self._lowest[new] = self._value[new]
        self._x_adv[self._rows[new]] = self._set(new)

    def _ask(self, count: int, points: Callable[[Tensor, slice], Tensor]) -> Tensor:
        self._left -= count
        return answers(self._problem, count, points)

    def _set(self, rows: Tensor) -> Tensor:
        return self._paint(rows, self._places[rows], self._tints[rows])

    def _paint(self, rows: Tensor, places: Tensor, tints: Tensor) -> Tensor:
        return painted(self._problem.x[rows], places, self._colours[tints])
