"""The only thing an attack talks to: it queries the target, counts the queries and keeps the best point of each example."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from robustkit._engine.best_so_far import BestSoFar, Keep
from robustkit._engine.gradients import input_gradient, mean, vjp, without_signal
from robustkit._engine.jacobian import Jacobian
from robustkit._engine.layers import flat_output, layer_named, layers_of, truncate_after
from robustkit._engine.ledger import Check, Message
from robustkit._engine.noise import Noise
from robustkit._engine.output_checks import check_final_output, check_first_output, predict_one
from robustkit._engine.state_guard import random_state
from robustkit._engine.tensors import abs_max, at_least_float32, round_towards
from robustkit.goals import Goal
from robustkit.target import Fn, Target
from robustkit.threats import Threat

__all__ = ["Problem"]

_DRAWS, _RELIABLE = 9, 0.75  # draws of a random target, and the share of successes above which an attack may stop

_ALL = slice(None)


@final
class Problem:
    """The examples to attack. All tensors that go in and come out have one row per example.

    Solved examples are skipped: the model is not queried about them, and their loss and gradient are zero. An attack need
    not handle them; its loop ends by itself if it runs over `steps(n)`.

    Attributes:
        x: The clean inputs, (N, *S); float32 where the model works in half precision.
        ref: What the goal compares with, (N, ...).
        threat: The allowed perturbations.
        goal: What success means; the attack minimises its loss.
    """

    def __init__(
        self,
        target: Target,
        x: Tensor,
        ref: Tensor,
        goal: Goal,
        threat: Threat,
        noise: Noise,
        best: BestSoFar,
        rows: Tensor | slice = _ALL,
    ) -> None:
        self._target, self._x, self.ref, self.goal, self.threat = target, x, ref, goal, threat
        self._success_goal, self._success_ref = goal, ref  # these define success, whatever loss is followed
        self._noise, self._best = noise, best
        self._rows = rows  # of these examples in the ledger; counting with a slice is cheaper than with indices
        self._indices = torch.arange(len(x), device=x.device)
        self.x = at_least_float32(x)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor | slice) -> Problem:
        """A problem of some of the examples, given by indices, a mask or a slice, with the same ledger.

        An index may occur several times, to query several points of one example at once.
        """
        rows = self._indices[rows]
        x, ref, goal = self._x[rows], self._success_ref[rows], self._success_goal
        ledger_rows = self._ledger_rows(rows)
        part = Problem(self._target, x, ref, goal, self.threat[rows], self._noise[rows], self._best, ledger_rows)
        part.goal, part.ref = self.goal, ref if self.ref is self._success_ref else self.ref[rows]
        return part

    def batches(self, size: int) -> Iterator[Problem]:
        """The examples in batches of at most `size`, in order."""
        for first in range(0, len(self), size):
            yield self[first : first + size]

    @property
    def version(self) -> tuple[int, ...]:
        """Torch's version counters of the inputs and the reference: they change when somebody writes to these in place."""
        return self.x._version, self._x._version, self.ref._version

    def compared_with(self, ref: Tensor) -> Problem:
        """The same examples with another reference, (N, ...), that also defines success."""
        return Problem(self._target, self._x, ref, self.goal, self.threat, self._noise, self._best, self._rows)

    def fresh_copy(self, keep: Keep, threat: Threat | None = None, draw: int = 0) -> Problem:
        """The same examples, all unsolved and with no best point, within `threat` or the same threat.

        Queries are counted in the ledger of this run. A success does not count for this run; query this problem at the
        point for that. `draw` numbers the random numbers of the copy.
        """
        best = BestSoFar(keep, self._best.best.x_adv, self._best.stochastic)
        best.ledger, best.checked = self._best.ledger, self._best.checked
        goal, ref = self._success_goal, self._success_ref
        return Problem(
            self._target, self._x, ref, goal, threat or self.threat, self._noise.at("afresh", draw), best, self._rows
        )

    def subproblem(
        self,
        rows: Tensor,
        *,
        keep: Keep = "first",
        threat: Threat | None = None,
        fn: Fn | None = None,
        goal: Goal | None = None,
        ref: Tensor | None = None,
    ) -> Problem:
        """A separate problem of the examples `rows` (M,), all unsolved, with a ledger of its own (see `charge`).

        Args:
            rows: Indices of the examples; an index may occur several times.
            keep: As for `Attack.__call__`.
            threat: Instead of this problem's threat; one row per index.
            fn: A deterministic function to query instead of the target.
            goal: Instead of this problem's goal.
            ref: Instead of this problem's reference, (M, ...).
        """
        best = BestSoFar(keep, self.x[rows], self.stochastic if fn is None else False)
        best.checked = fn is None
        target = self._target if fn is None else Target(fn, stochastic=False, batch_size=self.batch_size)
        return Problem(
            target,
            self._x[rows],
            self._success_ref[rows] if ref is None else ref,
            goal or self._success_goal,
            self.threat[rows] if threat is None else threat,
            self._noise[rows].at("aside"),
            best,
        )

    def charge(self, rows: Tensor, other: Problem) -> None:
        """Add the queries and checks of the subproblem `other` to the examples `rows` (M,) of this ledger."""
        cost = other._best.ledger
        self._best.ledger.charge(self._ledger_rows(rows), cost.forwards, cost.backwards, cost.flat)
        self.checks.extend(other.checks)

    def submit_batch(self, x_adv: Tensor) -> None:
        """Return these points, (N, *S), whatever was found before; their success is evaluated on the batch as a whole.

        For models whose output for one example depends on the others, such as batch norm in training mode.
        """
        success, rows = self.evaluate(x_adv, self._indices), self._ledger_rows(_ALL)
        best = self._best.best
        best.x_adv[rows], best.score[rows], best.success[rows] = x_adv.detach(), 0.0, success
        self._best.unsolved[rows] = ~success

    @property
    def initially_successful(self) -> Tensor:
        """Which examples reached the goal without a perturbation, before the attack began, (N,) bool."""
        ledger = self._best.ledger
        return (ledger.solver[self._rows] == 0) & any(stage.name == "clean" for stage in ledger.stages[:1])

    @property
    def features(self) -> Fn | None:
        """The target up to its last hidden layer, where the target states it."""
        return self._target.features

    @property
    def early_stop(self) -> bool:
        """Whether solved examples are skipped."""
        return self._best.early_stop

    @property
    def best(self) -> Tensor:
        """The best point of each example so far, (N, *S)."""
        return self._best.best.x_adv[self._rows]

    def in_double(self) -> Problem | None:
        """A separate problem on a float64 copy of the model; None where the target is not a plain module.

        Queries of the copy are not queries of the model under attack and are not counted.
        """
        if not isinstance(self._target.fn, nn.Module) or self._target.view is not self._target.fn:
            return None
        other = self.subproblem(self._indices, keep="last", fn=deepcopy(self._target.fn).double())
        other._x, other.x = self._x.double(), self.x.double()
        return other

    @property
    def views(self) -> tuple[str, ...]:
        """The names of the views that an adversary may differentiate; gradients are those of the first."""
        return tuple(self._target.views)

    def with_view(self, view: str) -> Problem:
        """The same problem with the gradients of another view."""
        other = self[:]
        other._target = self._target.with_view(view)
        return other

    def with_eot_draws(self, draws: int) -> Problem:
        """The same problem with gradients averaged over at least `draws` draws (EOT, Athalye et al. 2018)."""
        other = self[:]
        other._target = replace(self._target, draws=max(draws, self._target.draws))
        return other

    @property
    def stochastic(self) -> bool:
        """Whether the target draws random numbers."""
        return self._best.stochastic

    @property
    def flat(self) -> Tensor:
        """Number of gradients of each example without a signal: zero, not finite or missing, (N,) int64."""
        return self._best.ledger.flat[self._rows]

    def with_surrogate_loss(self, goal: Goal, ref: Tensor) -> Problem:
        """The same problem with the loss of another goal and its reference, (N, ...).

        What counts as success, and which point is best, stays the same: one of the goal's parts, or its loss with another
        surrogate, may be a better way to it.
        """
        other = self[:]
        other.goal, other.ref = goal, ref
        return other

    @property
    def unsolved(self) -> Tensor:
        """Which examples are unsolved, (N,) bool."""
        return self._best.unsolved[self._rows]

    def steps(self, count: int) -> Iterator[int]:
        """0, 1, ... count - 1, ending early when every example is solved."""
        for step in range(count):
            if self._best.early_stop and not self.unsolved.any():
                return
            yield step

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Record the cost of the `with` block, and how many examples it solves, as a stage."""
        with self._best.ledger.stage(name, self._best.best.success):
            yield

    @property
    def cost(self) -> Tensor:
        """Cost of each example so far in forward passes, a gradient counted as two, (N,) int64."""
        return (self._best.ledger.forwards + 2 * self._best.ledger.backwards)[self._rows]

    def add_note(self, name: str, why: str) -> None:
        """Add a note to the result, unless it is there already."""
        notes, message = self._best.ledger.notes, Message(name, why)
        notes.extend([message] if message not in notes else [])

    def record_check(self, name: str, hits: Tensor | int, of: int, limit: float = 0.5) -> None:
        """Record that the check `name` was positive in `hits` of `of` cases; a sound model has a share of at most `limit`."""
        self._best.ledger.checks.append(Check(name, int(hits), of, limit))

    @property
    def checks(self) -> list[Check]:
        """The recorded checks of the whole run."""
        return self._best.ledger.checks

    @property
    def batch_size(self) -> int:
        """The largest batch for the model, for attacks that query several points of each example at once."""
        return self._target.batch_size

    @property
    def ids(self) -> Tensor:
        """The ids of the examples, (N,) int64; each example draws its noise by its id."""
        return self._noise.ids

    def noise(self, *path: str | int) -> Noise:
        """Random numbers of each example; `path` names their purpose and draw, and no two draws may share a path."""
        return self._noise.at(*path)

    def common_noise(self, *path: str | int) -> Noise:
        """Random numbers that all examples share, one row, the same for any batch."""
        return Noise(self._noise.seed, self.ids.new_zeros(1), ("common", *path))

    def start(self, draw: int = 0) -> Tensor:
        """A random point of the threat set for each example, (N, *S); restarts number their draws."""
        return self.threat.sample(self.x, self.noise("start", draw))

    def success(self, x_adv: Tensor) -> Tensor:
        """Whether each example reaches the goal at `x_adv`, (N,) bool; True for solved examples, which are not queried."""
        at = self._active()
        success = ~self.unsolved
        if len(at):
            success[at] = self._query(x_adv, at)[1]
        return success

    def loss(self, x_adv: Tensor) -> Tensor:
        """The loss to minimise, (N,), without a gradient."""
        at = self._active()
        loss = self.x.new_zeros(len(self))
        if len(at):
            loss[at] = self.goal.loss(self._query(x_adv, at)[0], self.ref[at]).to(loss)
        return loss

    def loss_and_grad(self, x_adv: Tensor) -> tuple[Tensor, Tensor]:
        """The loss to minimise (N,) and its gradient with respect to `x_adv` (N, *S).

        One pass through the model serves the loss, the gradient and the success at `x_adv`. Gradients are averaged over
        the target's `draws`; entries that are not finite are returned as zero and counted as flat.
        """
        at = self._active()
        if len(at) == len(self):
            return self._differentiate(x_adv, _ALL)
        loss, grad = self.x.new_zeros(len(self)), torch.zeros_like(self.x)
        if len(at):
            loss[at], grad[at] = self._differentiate(x_adv, at)
        return loss, grad

    @torch.no_grad()
    def evaluate(self, x_adv: Tensor, at: Tensor) -> Tensor:
        """Whether the examples `at` (M,) reach the goal at `x_adv`, solved or not; no point is kept. (M,) bool."""
        out = self._forward(self._target.fn, self._input(x_adv, at), at)
        goal, ref = self._success_goal, self._success_ref[at]
        success = goal.success(out, ref)
        # A tie in one random output means nothing.
        tied = torch.zeros_like(success) if self.stochastic else ~success & (goal.boundary_margin(out, ref) == 0)
        self.checks.extend(check_final_output(out, tied))
        return success

    def predict(self, x_adv: Tensor) -> Any:
        """The output of the deployed function at `x_adv` for every example, solved or not; successes are kept."""
        return self._query(x_adv, _ALL)[0]

    def gradients(self, x_adv: Tensor, values: Callable[[Any, Tensor], Iterable[Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Several functions of one output: the value of each, (N,), and its gradient with respect to `x_adv`, (N, *S).

        One pass through the model serves them all; each gradient is counted, and is flat where it has no signal. Every
        example is queried, solved or not; successes are kept. Both are averaged over the target's `draws`.

        Args:
            x_adv: The points, (N, *S).
            values: Maps an output of the adversary's view and the reference to the functions' values, each (N,).
        """
        draws = []
        for _ in range(self._target.draws):
            x_in = self._input(x_adv, _ALL).requires_grad_()
            with torch.enable_grad():
                out = self._forward(self._target.view, x_in, _ALL)
                outputs = list(values(out, self.ref))
            self._record_iterate(x_adv, _ALL, out, None)
            draws.append([(value.detach(), self._gradient(value, x_in, retain_graph=True)) for value in outputs])
        for number in range(min(map(len, draws))):
            value, grad = (mean([draw[number][part] for draw in draws]).to(self.x) for part in (0, 1))
            self._count(self._best.ledger.backwards, _ALL, len(draws))
            yield value, self._finite(grad, x_adv, _ALL)

    def predict_and_vjp(self, x_adv: Tensor) -> tuple[Any, Callable[[Tensor], Tensor]]:
        """The output of the adversary's view at `x_adv` and its vector-Jacobian product, for attacks with their own loss.

        The product maps d loss / d output to d loss / d x_adv, (N, K) -> (N, *S), for outputs that are one tensor. Each
        call of it counts as a gradient. Another library's loss may have a zero gradient, so only an output without a graph
        counts as flat. Every example is queried, solved or not; successes are kept.
        """
        x_in = self._input(x_adv, _ALL).requires_grad_()
        with torch.enable_grad():
            out = self._forward(self._target.view, x_in, _ALL)
        self._record_iterate(x_adv, _ALL, out, None)

        def counted_vjp(grad_out: Tensor) -> Tensor:
            self._count(self._best.ledger.backwards, _ALL)
            self._count(self._best.ledger.flat, _ALL, 0 if out.requires_grad else 1)
            return vjp(out, x_in, grad_out).to(self.x)

        return out, counted_vjp

    def layers(self) -> tuple[str, ...]:
        """The innermost layers that the adversary's view runs, by name, in order; empty for a function without a module."""
        return tuple(name for name, layer in self._layers().items() if not any(layer.children()))

    def jacobian(self, layer: str | None) -> Jacobian:
        """The Jacobian of a layer, or of the output where `layer` is None, at the clean inputs; every product is counted.

        Raises:
            ArgumentError: There is no layer of that name; the message lists the names.
        """
        fn = flat_output(self._target.view)
        if layer is not None:
            fn = truncate_after(layer_named(layer, self._layers()), self._target.view)
        return Jacobian(fn, self._input(self.x, _ALL), partial(self._best.ledger.charge, self._rows))

    def _layers(self) -> dict[str, nn.Module]:
        """The layers that the adversary's view runs, found by one pass of the first example."""
        first = slice(0, 1)
        self._count(self._best.ledger.forwards, first)
        return layers_of(self._target.module, self._target.view, self._input(self.x, first))

    def reliably_reached(self, x_adv: Tensor) -> Tensor:
        """Whether the goal is reached at `x_adv` beyond luck, (N,) bool: on most of nine draws where the target is random."""
        if not self._best.stochastic:
            return self.success(x_adv)
        return torch.stack([self.success(x_adv) for _ in range(_DRAWS)]).double().mean(0) > _RELIABLE

    def _active(self) -> Tensor:
        """Indices of the examples that the model is still queried about."""
        if self._best.early_stop and not self._best.unsolved.all():
            return self.unsolved.nonzero().squeeze(1)
        return self._indices

    def _count(self, counts: Tensor, at: Tensor | slice, amount: int | Tensor = 1) -> None:
        """Add `amount` to the counts of the examples `at`."""
        self._best.ledger.add(counts, at if isinstance(self._rows, slice) else self._rows[at], amount)

    def _ledger_rows(self, at: Tensor | slice) -> Tensor:
        """The rows of the examples `at` in the ledger."""
        rows = self._indices[at]
        return rows if isinstance(self._rows, slice) else self._rows[rows]

    def _input(self, x_adv: Tensor, at: Tensor | slice) -> Tensor:
        """The points of the examples `at`, detached, in the dtype of the model."""
        x_adv = x_adv[at].detach()
        return round_towards(x_adv, self._x[at]) if x_adv.dtype != self._x.dtype else x_adv

    def _forward(self, fn: Fn, x: Tensor, at: Tensor | slice) -> Any:
        """One counted pass of a copy of `x`, so that a model may write to its input; the first output is checked."""
        self._count(self._best.ledger.forwards, at)
        if self._best.checked:
            return fn(x.clone()) if len(x) > 1 else self._predict_one(fn, x)
        generators = self._target.generators
        before = random_state(generators)
        out = fn(x.clone()) if len(x) > 1 else self._predict_one(fn, x)
        self._best.set_stochastic(stochastic=before != random_state(generators))
        self._success_goal.check(out, self._success_ref[at])
        self._best.first_output_checks = check_first_output(out)
        return out

    def _predict_one(self, fn: Fn, x: Tensor) -> Any:
        """The output for a batch of one, with a note where the model fails on such a batch."""
        out, error = predict_one(fn, x)
        if error is not None:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            self.add_note("fails-alone", f"the model fails on a batch of one ({why}); it was given two copies instead")
        return out

    @torch.no_grad()
    def _query(self, x_adv: Tensor, at: Tensor | slice) -> tuple[Any, Tensor]:
        """The output of the deployed function at `x_adv` for the examples `at`, and whether they reach the goal."""
        out = self._forward(self._target.fn, self._input(x_adv, at), at)
        return out, self._update_best(x_adv, at, out)

    def _update_best(self, x_adv: Tensor, at: Tensor | slice, out: Any, loss: Tensor | None = None) -> Tensor:
        """Keep the points with these outputs that are better than the best so far; returns their success, (M,) bool."""
        goal, ref, best = self._success_goal, self._success_ref, self._best
        success = goal.success(out, ref[at])
        if best.compares_loss:
            loss = goal.loss(out, ref[at]) if loss is None else loss
            best.update(self._ledger_rows(at), x_adv[at].detach(), self.x[at], self.threat[at], success, loss)
        elif best.tracks_best and len(hits := success.nonzero().squeeze(1)):  # only successes can be kept; most steps have none
            at = self._indices[at][hits]
            best.update(self._ledger_rows(at), x_adv[at].detach(), self.x[at], self.threat[at], success[hits], None)
        return success

    def _record_iterate(self, x_adv: Tensor, at: Tensor | slice, out: Any, loss: Tensor | None) -> None:
        """Update the best points by an output of the view, or by another pass where the view is not the deployed function."""
        if not self._best.tracks_best:
            return
        with torch.no_grad():
            if self._target.view is self._target.fn:
                self._update_best(x_adv, at, out, loss)
            else:
                self._query(x_adv, at)

    def _differentiate(self, x_adv: Tensor, at: Tensor | slice) -> tuple[Tensor, Tensor]:
        ref, view = self.ref[at], self._target.view
        x_in = self._input(x_adv, at).requires_grad_()
        losses, grads = [], []
        for _ in range(self._target.draws):
            with torch.enable_grad():
                out = self._forward(view, x_in, at)
                loss = self.goal.loss(out, ref)
            grads.append(self._gradient(loss, x_in))
            losses.append(loss.detach())
        self._count(self._best.ledger.backwards, at, self._target.draws)
        loss, grad = mean(losses).to(self.x), mean(grads).to(self.x)
        is_success_loss = self.goal is self._success_goal and self.ref is self._success_ref
        self._record_iterate(x_adv, at, out, loss if is_success_loss else None)
        return loss, self._finite(grad, x_adv, at)

    def _gradient(self, values: Tensor, x: Tensor, *, retain_graph: bool = False) -> Tensor:
        """The gradient, (N, *S); zero where autograd fails, which is recorded."""
        grad = input_gradient(values, x, retain_graph=retain_graph)
        if grad is None:
            self.record_check("broken-autograd", len(x), len(x), 0.0)
        return torch.zeros_like(x) if grad is None else grad

    def _finite(self, grad: Tensor, x_adv: Tensor, at: Tensor | slice) -> Tensor:
        """The gradient with zeros for entries that are not finite; gradients without a signal are counted as flat."""
        flat = without_signal(grad)
        if flat is None:
            return grad
        if self.goal.vanishes_at_x:
            flat &= abs_max(x_adv[at] - self.x[at]) > 0
        self._count(self._best.ledger.flat, at, flat.long())
        return torch.where(grad.isfinite(), grad, 0)
