"""A search over pixels that queries the candidates with the best acquisition value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from robustkit._engine.field_checks import at_least
from robustkit.attacks.pixels._locations import EffectMap, extreme_colours, paint, query_losses
from robustkit.attacks.pixels._pixel_attack import PixelAttack
from robustkit.problem import Problem

__all__ = ["PixelSearch"]

_BEST_LOCATIONS = 4  # at which all extreme colours are queried, for one pixel
_LAST = -1e300  # acquisition value of candidates that were queried before: after all others, but before forbidden ones
_TOP_CANDIDATES = 32  # locations among which a stalled search draws a new set


@final
@dataclass(frozen=True)
class PixelSearch(PixelAttack):
    """Queries black and white pixels where earlier queries predict the largest effect, and other extreme colours at the end.

    One pixel: black and white on a coarse grid; then, a few at a time, the candidates with the best acquisition value; with
    the last quarter of the queries the other extreme colours: all of them at the best four locations, then those that did
    well there at the next locations (with one channel there are none, and no such quarter). The acquisition value of a
    candidate is the effect predicted from queries at nearby locations, plus a bonus where there were few: the effect of a
    pixel varies slowly over an image.

    Several pixels: the best pixels of a coarse grid together; then each in turn is taken out, and the best of the top
    candidates replaces it if that lowers the loss. Where a round over all pixels changes nothing, the whole set is redrawn
    among the top locations. At the end each pixel is tried in the other extreme colours.

    Every image gets the same number of queries between two updates of the predictions, so that no result depends on the
    batch; an image leaves the batch at its first success.

    Attributes:
        pixels: Largest number of pixels to change; None for as many as the threat allows. An image with a smaller budget of
            its own keeps to that.
        queries: Largest number of forward passes of an image per pixel that it may change: three pixels may cost three times
            as many. At least 3; the evaluation by the caller is not included.
        at_once: Number of candidates that are queried between two updates.

    Source: our own. That extreme colours suffice: Croce & Hein 2019, "Sparse and imperceivable adversarial attacks",
        section 3 (CornerSearch, https://arxiv.org/abs/1909.05040), which queries all locations and corners, and draws
        several pixels by the rank of the single ones. Replacing few pixels at a time: Sparse-RS (see `SparseRS`).
    """

    queries: int = 600
    at_once: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(3, queries=self.queries)
        at_least(1, at_once=self.at_once)

    def search(self, problem: Problem, count: int) -> Tensor:
        """One search for all images, in lockstep."""
        return _Search(problem, count, count * self.queries, self.at_once).run()


@final
class _Search:
    """A set of `count` pixels for each image; solved images are dropped on the way.

    A candidate is a location in one of the first two extreme colours: the number colour * H * W + location.
    """

    def __init__(self, problem: Problem, count: int, queries: int, at_once: int) -> None:
        x = problem.x
        self._x_adv, self._rows = x.clone(), torch.arange(len(x), device=x.device)
        self._problem, self._count, self._queries_left, self._at_once = problem, count, queries, at_once
        self._effects, self._palette = EffectMap(x, problem.threat), extreme_colours(x, problem.threat)
        self._num_locations = x.shape[2] * x.shape[3]
        # The pixels of each set: their locations and the indices of their colours in the palette.
        self._locations = torch.arange(count, device=x.device).repeat(len(x), 1)
        self._colours = torch.zeros_like(self._locations)
        # The loss of the current set, the lowest loss of any set, and the loss of the clean image.
        self._loss, self._lowest, self._clean_loss = torch.full((3, len(x)), torch.inf, dtype=torch.float64, device=x.device)
        # Which candidates were queried in each slot beside the other pixels as they are.
        self._queried = torch.zeros(len(x), count, 2 * self._num_locations, dtype=torch.bool, device=x.device)
        self._stalled = torch.zeros(len(x), dtype=torch.int64, device=x.device)  # turns in a row without a change
        self._unqueried = 2 * self._num_locations  # single pixels; sets of several are too many to run out of

    def run(self) -> Tensor:
        """The images with the queried sets of lowest loss, (N, C, H, W)."""
        more_colours = len(self._palette) - 2
        reserved = more_colours * self._count if self._count > 1 else self._queries_left // 4 * (more_colours > 0)
        self._initialise()
        turn = 0
        while self._queries_left > reserved + (self._count > 1) and self._unqueried and self._drop_solved():
            self._restart_stalled(turn)
            self._replace_pixel(turn % self._count, self._queries_left - reserved)
            turn += 1
        if more_colours and self._queries_left > 0 and self._drop_solved():
            if self._count > 1:
                self._recolour_each(more_colours)
            else:
                self._recolour_single(more_colours)
        return self._x_adv

    def _drop_solved(self) -> bool:
        """Drop the solved images; whether there are others."""
        unsolved = self._problem.unsolved
        if not unsolved.all():
            self._problem, self._rows = self._problem[unsolved], self._rows[unsolved]
            self._effects.keep(unsolved)
            self._locations, self._colours = self._locations[unsolved], self._colours[unsolved]
            self._loss, self._lowest = self._loss[unsolved], self._lowest[unsolved]
            self._clean_loss = self._clean_loss[unsolved]
            self._queried, self._stalled = self._queried[unsolved], self._stalled[unsolved]
        return len(self._rows) > 0

    def _initialise(self) -> None:
        """Query a coarse grid of single pixels, and the best of them together."""
        self._clean_loss = self._query(1, lambda rows, _: self._problem.x[rows])[:, 0]
        no_pixels = self._locations[:, :0]
        candidates = self._effects.grid(both_colours=self._count == 1)[:, : self._queries_left - (self._count > 1)]
        losses = self._query_candidates(candidates, no_pixels, no_pixels, self._clean_loss)
        if self._count == 1:
            self._queried[:, 0].scatter_(1, candidates, True)
            self._accept_best(0, candidates, losses)
            self._unqueried -= candidates.shape[1]
            return
        effect, colour = self._effects.observed.reshape(len(losses), 2, -1).max(1)
        self._locations = effect.argsort(dim=1, descending=True, stable=True)[:, : self._count]
        self._colours = colour.gather(1, self._locations)
        self._loss = self._query(1, lambda rows, _: self._painted_sets(rows))[:, 0]
        self._save_best()

    def _replace_pixel(self, slot: int, queries: int) -> None:
        """Take the pixel of one slot out of each set, and query the top candidates in its place."""
        others = [i for i in range(self._count) if i != slot]
        locations, colours = self._locations[:, others], self._colours[:, others]
        acquisition = self._effects.acquisition().masked_fill(self._queried[:, slot], _LAST)
        loss_without = self._clean_loss
        if others:
            for offset in (0, self._num_locations):
                acquisition.scatter_(1, locations + offset, -torch.inf)
            self._exclude_current(acquisition, slot)
            loss_without = self._query(1, lambda rows, _: self._paint(rows, locations[rows], colours[rows]))[:, 0]
        available = 2 * (self._num_locations - len(others)) - bool(others)
        number = min(self._at_once, queries - bool(others), available, self._unqueried)
        candidates = _top_candidates(acquisition, number)
        losses = self._query_candidates(candidates, locations, colours, loss_without)
        self._queried[:, slot].scatter_(1, candidates, True)
        lower = self._accept_best(slot, candidates, losses)
        self._stalled = torch.where(lower, 0, self._stalled + 1)
        self._unqueried -= number if self._count == 1 else 0
        self._queried[:, others] &= ~lower[:, None, None]

    def _exclude_current(self, acquisition: Tensor, slot: int) -> None:
        """Forbid the current pixel of the slot: its loss is known, and rounding in another batch could make it look lower.

        A set that was redrawn has not been queried yet, so its pixel is allowed.
        """
        current = (self._locations[:, slot] + self._colours[:, slot] * self._num_locations).unsqueeze(1)
        value = acquisition.gather(1, current)
        acquisition.scatter_(1, current, torch.where(self._loss.isfinite().unsqueeze(1), -torch.inf, value))

    def _restart_stalled(self, turn: int) -> None:
        """Redraw sets among the top locations where a round over all their pixels changed nothing."""
        number = min(_TOP_CANDIDATES, self._num_locations)
        rows = (self._stalled >= self._count).nonzero().squeeze(1)
        if self._count == 1 or number <= self._count or not len(rows):
            return
        noise = self._problem[rows].noise("anew", turn)
        acquisition, colour = self._effects.acquisition()[rows].reshape(len(rows), 2, -1).max(1)
        top = _top_candidates(acquisition, number)
        chosen = noise.at("place").uniform(number).argsort(dim=1, stable=True)[:, : self._count]
        self._locations[rows] = top.gather(1, chosen)
        # One in four gets the colour of lower acquisition value: single pixels may not show what works in combination.
        other_colour = (noise.at("colour").uniform(self._count) < 0.25).long()
        self._colours[rows] = (colour.gather(1, self._locations[rows]) + other_colour) % 2
        self._loss[rows], self._queried[rows], self._stalled[rows] = torch.inf, False, 0

    def _recolour_each(self, more_colours: int) -> None:
        """Query the other extreme colours for each pixel of the sets in turn."""
        for slot in range(self._count):
            colours = 2 + torch.arange(min(more_colours, max(0, self._queries_left)), device=self._colours.device)
            if not len(colours):
                return

            def points(rows: Tensor, chunk: slice, slot: int = slot, colours: Tensor = colours) -> Tensor:
                number = len(colours[chunk])
                recoloured = self._colours[rows].repeat_interleave(number, 0)
                recoloured[:, slot] = colours[chunk].repeat(len(rows))
                locations = self._locations[rows].repeat_interleave(number, 0)
                return self._paint(rows.repeat_interleave(number), locations, recoloured)

            loss, best = self._query(len(colours), points).min(1)
            lower = loss < self._loss
            self._colours[:, slot] = torch.where(lower, colours[best], self._colours[:, slot])
            self._loss = torch.where(lower, loss, self._loss)
            self._save_best()

    def _recolour_single(self, more_colours: int) -> None:
        """Query the other extreme colours at the best locations, then those that did well there at the next locations."""
        observed = self._effects.observed.reshape(len(self._rows), 2, -1).amax(1)
        colours = torch.arange(more_colours, device=observed.device)
        number = min(_BEST_LOCATIONS, self._num_locations, max(1, self._queries_left // more_colours))
        locations = observed.argsort(dim=1, descending=True, stable=True)[:, :number]
        candidates = (colours * self._num_locations + locations.unsqueeze(2)).flatten(1)[:, : self._queries_left]
        losses = self._query_colours(candidates)
        effects = self._clean_loss.unsqueeze(1) - losses
        effects = torch.where(effects.isfinite(), effects, 0).clamp(min=0)
        colour_effect = torch.zeros(len(observed), more_colours, dtype=observed.dtype, device=observed.device)
        colour_effect = colour_effect.scatter_add(1, candidates // self._num_locations, effects)
        # Locations without an observation come after those with a poor one, and nothing is queried twice.
        strength = torch.where(observed.isfinite(), observed.clamp(min=0), -1).unsqueeze(1)
        score = torch.where(strength < 0, strength, colour_effect.unsqueeze(2) * strength).flatten(1)
        number = min(self._queries_left, more_colours * self._num_locations - candidates.shape[1])
        if number > 0:
            score = score.scatter(1, candidates, -torch.inf)
            self._query_colours(_top_candidates(score, number))

    def _query_colours(self, candidates: Tensor) -> Tensor:
        """The losses with single pixels in the other extreme colours, numbered as candidates from palette index 2, (N, M)."""
        locations, colours = candidates % self._num_locations, candidates // self._num_locations + 2

        def points(rows: Tensor, chunk: slice) -> Tensor:
            repeated = rows.repeat_interleave(chunk.stop - chunk.start)
            return self._paint(repeated, locations[rows, chunk].reshape(-1, 1), colours[rows, chunk].reshape(-1, 1))

        losses = self._query(candidates.shape[1], points)
        loss, best = losses.min(1, keepdim=True)
        lower = loss < self._loss.unsqueeze(1)
        self._locations = torch.where(lower, locations.gather(1, best), self._locations)
        self._colours = torch.where(lower, colours.gather(1, best), self._colours)
        self._loss = torch.minimum(loss.squeeze(1), self._loss)
        self._save_best()
        return losses

    def _query_candidates(self, candidates: Tensor, locations: Tensor, colours: Tensor, loss_without: Tensor) -> Tensor:
        """The losses with each candidate (N, M) beside the given pixels (N, K); their effects update the effect map."""

        def points(rows: Tensor, chunk: slice) -> Tensor:
            candidate = candidates[rows, chunk].reshape(-1, 1)
            rows = rows.repeat_interleave(chunk.stop - chunk.start)
            set_locations = torch.cat([locations[rows], candidate % self._num_locations], 1)
            set_colours = torch.cat([colours[rows], candidate // self._num_locations], 1)
            return self._paint(rows, set_locations, set_colours)

        losses = self._query(candidates.shape[1], points)
        effects = loss_without.unsqueeze(1) - losses
        self._effects.update(candidates, torch.where(effects.isfinite(), effects, 0))
        return losses

    def _accept_best(self, slot: int, candidates: Tensor, losses: Tensor) -> Tensor:
        """Put the best candidate into the slot where that lowers the loss of the set; returns where, (N,) bool."""
        loss, best = losses.min(1)
        lower: Tensor = loss < self._loss
        candidate = candidates.gather(1, best.unsqueeze(1)).squeeze(1)
        self._locations[:, slot] = torch.where(lower, candidate % self._num_locations, self._locations[:, slot])
        self._colours[:, slot] = torch.where(lower, candidate // self._num_locations, self._colours[:, slot])
        self._loss = torch.where(lower, loss, self._loss)
        self._save_best()
        return lower

    def _save_best(self) -> None:
        """Save the images of the sets whose loss is the lowest so far."""
        rows = (self._loss < self._lowest).nonzero().squeeze(1)
        self._lowest[rows] = self._loss[rows]
        self._x_adv[self._rows[rows]] = self._painted_sets(rows)

    def _query(self, count: int, points: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """The losses of `count` points per image; see `query_losses`."""
        self._queries_left -= count
        return query_losses(self._problem, count, points)

    def _painted_sets(self, rows: Tensor) -> Tensor:
        """The images `rows` with their current sets."""
        return self._paint(rows, self._locations[rows], self._colours[rows])

    def _paint(self, rows: Tensor, locations: Tensor, colours: Tensor) -> Tensor:
        """The images `rows` with pixels at `locations`, in colours given by their palette indices."""
        return paint(self._problem.x[rows], locations, self._palette[colours])


def _top_candidates(score: Tensor, number: int) -> Tensor:
    """The candidates of highest score, best first, (N, M) -> (N, number); of equal ones the first."""
    return score.argsort(dim=1, descending=True, stable=True)[:, :number]
