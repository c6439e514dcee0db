"""THE ONLY THING AN ATTACK TALKS TO: answers questions about a target, counts them, and keeps the best answer so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn

from robustkit._engine.best_so_far import BestSoFar, Keep
from robustkit._engine.jacobian import Jacobian
from robustkit._engine.layers import joined, layers_of, up_to
from robustkit._engine.ledger import Check, Message
from robustkit._engine.noise import Noise
from robustkit._engine.output_checks import check_final_output, check_first_output, predict_one
from robustkit._engine.state_guard import is_out_of_memory, random_state
from robustkit._engine.tensors import abs_max, at_least_float32, round_towards
from robustkit.errors import ArgumentError
from robustkit.goals import Goal
from robustkit.target import Fn, Target
from robustkit.threats import Threat

__all__ = ["Problem"]

_DRAWS, _SURE = 9, 0.75  # of a random target, and the share of them that tells an attack that an example is done


@final
class Problem:
    """Some examples to be attacked. All tensors that go in and come out have a row for each of them.

    Examples that are solved leave: the model no longer sees them, and their loss and gradient come back as zero. An
    attack need not know; its loop ends by itself when it runs over `steps(n)`.

    Attributes:
        x: The unchanged inputs, (N, *S); in float32 where the model works in half precision.
        ref: What the goal compares with, (N, ...).
        threat: What may change.
        goal: What success is.
    """

    def __init__(
        self,
        target: Target,
        x: Tensor,
        ref: Tensor,
        goal: Goal,
        threat: Threat,
        noise: Noise,
        kept: BestSoFar,
        rows: Tensor | None = None,
    ) -> None:
        self._target, self._raw, self.ref, self.goal, self.threat = target, x, ref, goal, threat
        self._judged_by = goal, ref  # what success is judged by, whatever is followed
        self._noise, self._kept = noise, kept
        # Where these stand in the ledger; a slice of everything costs less to count with than as many indices.
        self._rows = slice(None) if rows is None else rows
        self._everyone = torch.arange(len(x), device=x.device)
        self.x = at_least_float32(x)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor | slice) -> Problem:
        """The same questions about some of the examples, given by indices, a mask or a slice; same ledger.

        An example may be named several times, to try several points of it at once.
        """
        rows = self._everyone[rows]
        goal, ref = self._judged_by
        some = Problem(
            self._target,
            self._raw[rows],
            ref[rows],
            goal,
            self.threat[rows],
            self._noise[rows],
            self._kept,
            self._in_ledger(rows),
        )
        some.goal, some.ref = self.goal, some.ref if self.ref is ref else self.ref[rows]
        return some

    def batches(self, size: int) -> Iterator[Problem]:
        """The examples in groups of at most `size`, in order."""
        for first in range(0, len(self), size):
            yield self[first : first + size]

    @property
    def version(self) -> tuple[int, ...]:
        """Changes when anybody writes to the inputs or the reference: then nothing that is judged by them holds."""
        return self.x._version, self._raw._version, self.ref._version

    def compared_with(self, ref: Tensor) -> Problem:
        """The same questions about the same examples with another reference, (N, ...)."""
        return Problem(
            self._target,
            self._raw,
            ref,
            self.goal,
            self.threat,
            self._noise,
            self._kept,
            None if isinstance(self._rows, slice) else self._rows,
        )

    def fresh_copy(self, keep: Keep, threat: Threat | None = None, draw: int = 0) -> Problem:
        """The same examples with nobody solved and nothing kept, perhaps within another threat; what it costs is still counted.

        What it finds does not count for this run unless this problem is asked there too. Its noise is that of its `draw`.
        """
        kept = BestSoFar(keep, self._kept.best.x_adv, self._kept.stochastic)
        kept.ledger, kept.checked = self._kept.ledger, self._kept.checked
        goal, ref = self._judged_by
        rows = None if isinstance(self._rows, slice) else self._rows
        return Problem(self._target, self._raw, ref, goal, threat or self.threat, self._noise.at("afresh", draw), kept, rows)

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
        """Cases of their own, all open, with a ledger of their own (see `book`); `fn` is asked instead of the target."""
        kept = BestSoFar(keep, self.x[rows], self.stochastic if fn is None else False)
        kept.checked = fn is None
        target = self._target if fn is None else Target(fn, stochastic=False, batch_size=self.batch_size)
        return Problem(
            target,
            self._raw[rows],
            self._judged_by[1][rows] if ref is None else ref,
            goal or self._judged_by[0],
            self.threat[rows] if threat is None else threat,
            self._noise[rows].at("aside"),
            kept,
        )

    def charge(self, rows: Tensor, other: Problem) -> None:
        """Count what the examples `rows` were asked `aside`."""
        for name in ("forwards", "backwards", "flat"):
            self._count(getattr(self._kept.ledger, name), rows, getattr(other._kept.ledger, name))
        self.checks.extend(other.checks)

    def submit_batch(self, x_adv: Tensor) -> None:
        """These points are what comes back, judged all together, whatever was found before: where company matters."""
        reached, rows = self.recount(x_adv, self._everyone), self._in_ledger(slice(None))
        best = self._kept.best
        best.x_adv[rows], best.score[rows], best.found[rows] = x_adv.detach(), 0.0, reached
        self._kept.unsolved[rows] = ~reached

    @property
    def initially_successful(self) -> Tensor:
        """Which examples were solved without any change, before the attack began, (N,) bool."""
        ledger = self._kept.ledger
        looked = any(stage.name == "clean" for stage in ledger.stages[:1])
        return (ledger.solver[self._rows] == 0) & looked

    @property
    def features(self) -> Fn | None:
        """The target up to its last hidden layer, where that was given."""
        return self._target.features

    @property
    def early_stop(self) -> bool:
        """Whether solved examples leave the batch."""
        return self._kept.early_stop

    @property
    def best(self) -> Tensor:
        """The point of each example that would come back now, (N, *S)."""
        return self._kept.best.x_adv[self._rows]

    def in_double(self) -> Problem | None:
        """The same questions to a copy of the model in float64, nothing kept; None where the target is no plain module.

        What the copy is asked is not asked of the model under attack, and is not counted.
        """
        if not isinstance(self._target.fn, nn.Module) or self._target.view is not self._target.fn:
            return None
        other = self.subproblem(self._everyone, keep="last", fn=deepcopy(self._target.fn).double())
        other._raw, other.x = self._raw.double(), self.x.double()
        return other

    @property
    def views(self) -> tuple[str, ...]:
        """The names of the views that an adversary may differentiate; the first is followed."""
        return tuple(self._target.views)

    def seen(self, view: str) -> Problem:
        """The same questions through another view."""
        other = self[:]
        other._target = self._target.seen(view)
        return other

    def with_eot_draws(self, draws: int) -> Problem:
        """The same questions with gradients averaged over at least so many draws."""
        other = self[:]
        other._target = replace(self._target, draws=max(draws, self._target.draws))
        return other

    @property
    def stochastic(self) -> bool:
        """Whether the target draws random numbers."""
        return self._kept.stochastic

    @property
    def flat(self) -> Tensor:
        """How many of the gradients of each example carried no signal, (N,) int64."""
        flat: Tensor = self._kept.ledger.flat[self._rows]
        return flat

    def with_surrogate(self, goal: Goal, ref: Tensor) -> Problem:
        """The same examples with the loss of another goal, and its reference (N, ...), to make small.

        What success is, and what is kept, stays as it was: a detour, such as one of the goal's parts, or its loss with
        another surrogate.
        """
        other = self[:]
        other.goal, other.ref = goal, ref
        return other

    @property
    def unsolved(self) -> Tensor:
        """Which examples are still to be solved, (N,) bool."""
        return self._kept.unsolved[self._rows]

    def steps(self, count: int) -> Iterator[int]:
        """0, 1, ... count - 1, ending early when every example is solved."""
        for step in range(count):
            if self._kept.early_stop and not self.unsolved.any():
                return
            yield step

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Book the cost of what happens inside, and what it solves, as a stage of its own."""
        with self._kept.ledger.stage(name, self._kept.best.found):
            yield

    @property
    def cost(self) -> Tensor:
        """What each example has cost so far in forwards, a gradient counted as two, (N,) int64."""
        ledger = self._kept.ledger
        cost: Tensor = ledger.forwards + 2 * ledger.backwards
        return cost[self._rows]

    def add_note(self, name: str, why: str) -> None:
        """A fact that the reader of the result should know; told once."""
        message = Message(name, why)
        if message not in self._kept.ledger.notes:
            self._kept.ledger.notes.append(message)

    def record_check(self, name: str, hits: Tensor | int, of: int, limit: float = 0.5) -> None:
        """What a check has seen: in `hits` of `of` cases it was so; a sound model shows a share of at most `limit`."""
        self._kept.ledger.checks.append(Check(name, int(hits), of, limit))

    @property
    def checks(self) -> list[Check]:
        """What all checks have seen so far, of the whole run."""
        return self._kept.ledger.checks

    @property
    def batch_size(self) -> int:
        """The most images that may go through the model at once, for attacks that ask many questions about each example."""
        return self._target.batch_size

    @property
    def ids(self) -> Tensor:
        """The names of the examples, (N,) int64: their noise belongs to them."""
        return self._noise.ids

    def noise(self, *path: str | int) -> Noise:
        """Random numbers for these examples; name what they are for and which draw it is, so that none repeats."""
        return self._noise.at(*path)

    def common_noise(self, *path: str | int) -> Noise:
        """Random numbers that all examples share, one row; whatever examples these are."""
        return Noise(self._noise.seed, self.ids.new_zeros(1), ("common", *path))

    def start(self, draw: int = 0) -> Tensor:
        """A random point of the threat set for each example; restarts number their draws."""
        return self.threat.sample(self.x, self.noise("start", draw))

    def success(self, x_adv: Tensor) -> Tensor:
        """Whether each goal is reached at `x_adv`, (N,) bool; true for the examples that were solved before."""
        at = self._asked()
        reached = ~self.unsolved
        if len(at):
            reached[at] = self._judge(x_adv, at)[1]
        return reached

    def loss(self, x_adv: Tensor) -> Tensor:
        """What the attack is to make small, (N,), without a gradient."""
        at = self._asked()
        out = self.x.new_zeros(len(self))
        if len(at):
            out[at] = self.goal.loss(self._judge(x_adv, at)[0], self.ref[at]).to(out)
        return out

    def loss_and_grad(self, x_adv: Tensor) -> tuple[Tensor, Tensor]:
        """The loss (N,) and its gradient with respect to `x_adv` (N, *S).

        One pass through the model serves loss, gradient and judgement alike. Gradients are averaged over the target's
        `draws`; entries that are not finite come back as zero and are counted as flat.
        """
        at = self._asked()
        if len(at) == len(self):
            return self._differentiate(x_adv, slice(None))
        loss, grad = self.x.new_zeros(len(self)), torch.zeros_like(self.x)
        if len(at):
            loss[at], grad[at] = self._differentiate(x_adv, at)
        return loss, grad

    @torch.no_grad()
    def recount(self, x_adv: Tensor, at: Tensor) -> Tensor:
        """Whether each goal is reached at `x_adv` for the examples `at` (M,), solved or not; nothing is kept. (M,) bool."""
        out = self._forward(self._target.fn, self._input(x_adv, at), at)
        goal, ref = self._judged_by
        reached = goal.success(out, ref[at])
        # Of random answers a single one decides nothing.
        level = torch.zeros_like(reached) if self.stochastic else ~reached & (goal.boundary_margin(out, ref[at]) == 0)
        self.checks.extend(check_final_output(out, level))
        return reached

    def predict(self, x_adv: Tensor) -> Any:
        """What the deployed function says of `x_adv`, for every example, solved or not; kept if it solves one."""
        return self._judge(x_adv, slice(None))[0]

    def gradients(self, x_adv: Tensor, values: Callable[[Any, Tensor], Iterable[Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Several functions of one answer: the value of each, (N,), and its gradient with respect to `x_adv`, (N, *S).

        One pass through the model serves them all; each gradient counts, and one without signal counts as flat. Every
        example is asked, solved or not; what solves one on the way is kept.

        Both are averaged over the target's `draws`.

        Args:
            x_adv: Where, (N, *S).
            values: From an output of the adversary's view and the reference to the functions' values, each (N,).
        """
        everyone, draws = slice(None), []
        for _ in range(self._target.draws):
            x_in = self._input(x_adv, everyone).requires_grad_()
            with torch.enable_grad():
                out = self._forward(self._target.view, x_in, everyone)
                found = list(values(out, self.ref))
            if self._kept.tracks_best:
                with torch.no_grad():
                    self._judge_on_the_way(x_adv, everyone, out, None)
            draws.append([(value.detach(), self._gradient(value, x_in, keep=True)) for value in found])
        for number in range(min(map(len, draws))):
            value, grad = (_mean([draw[number][part] for draw in draws]).to(self.x) for part in (0, 1))
            self._count(self._kept.ledger.backwards, everyone, len(draws))
            yield value, self._with_signal(grad, x_adv, everyone)

    def predict_and_vjp(self, x_adv: Tensor) -> tuple[Any, Callable[[Tensor], Tensor]]:
        """What the adversary's view says of `x_adv`, and the way back through it, for attacks with a loss of their own.

        The way back takes d loss / d output to d loss / d x_adv, (N, K) -> (N, *S), for outputs that are one tensor. Each
        call of it counts as a gradient; the gradient of a foreign loss may well be zero, so only an output without any
        graph counts as flat. Every example is asked, solved or not; what solves one on the way is kept.
        """
        at, view = slice(None), self._target.view
        x_in = self._input(x_adv, at).requires_grad_()
        with torch.enable_grad():
            out = self._forward(view, x_in, at)
        if self._kept.tracks_best:
            with torch.no_grad():
                self._judge_on_the_way(x_adv, at, out, None)

        def pull(grad_out: Tensor) -> Tensor:
            self._count(self._kept.ledger.backwards, at)
            self._count(self._kept.ledger.flat, at, 0 if out.requires_grad else 1)
            if not out.requires_grad:
                return torch.zeros_like(self.x)
            grad = torch.autograd.grad(out, x_in, grad_out, retain_graph=True, allow_unused=True)[0]
            return torch.zeros_like(self.x) if grad is None else grad.to(self.x)

        return out, pull

    def layers(self) -> tuple[str, ...]:
        """The innermost layers that the adversary's view runs, by name, in order; none for a function without a module."""
        return tuple(name for name, layer in self._layers().items() if not any(layer.children()))

    def jacobian(self, layer: str | None) -> Jacobian:
        """How one layer, or the output where None is named, answers to small changes of the inputs; every product counts.

        Raises:
            ArgumentError: There is no layer of that name; the message lists them.
        """
        fn, ledger = joined(self._target.view), self._kept.ledger
        if layer is not None:
            found = self._layers()
            if layer not in found:
                raise ArgumentError(f"layer={layer!r} does not exist; this model has {', '.join(found) or 'no layers'}")
            fn = up_to(found[layer], self._target.view)

        def count(forwards: int, backwards: int, flat: Tensor | int = 0) -> None:
            for counts, amount in ((ledger.forwards, forwards), (ledger.backwards, backwards), (ledger.flat, flat)):
                self._count(counts, slice(None), amount)

        return Jacobian(fn, self._input(self.x, slice(None)), count)

    def _layers(self) -> dict[str, nn.Module]:
        """The layers that the adversary's view runs, found by one pass of the first example."""
        first = slice(0, 1)
        self._count(self._kept.ledger.forwards, first)
        return layers_of(self._target.module, self._target.view, self._input(self.x, first))

    def reliably_reached(self, x_adv: Tensor) -> Tensor:
        """Whether each goal is reached at `x_adv` beyond luck, (N,) bool: on three of four draws where the target is random."""
        if not self._kept.stochastic:
            return self.success(x_adv)
        return torch.stack([self.success(x_adv) for _ in range(_DRAWS)]).double().mean(0) > _SURE

    def _asked(self) -> Tensor:
        """The examples that the model still has to see, as indices."""
        if self._kept.early_stop and not self._kept.unsolved.all():
            return self.unsolved.nonzero().squeeze(1)
        return self._everyone

    def _count(self, count: Tensor, at: Tensor | slice, amount: int | Tensor = 1) -> None:
        """Book a cost of the examples `at`."""
        self._kept.ledger.add(count, at if isinstance(self._rows, slice) else self._rows[at], amount)

    def _in_ledger(self, at: Tensor | slice) -> Tensor:
        """Where the examples `at` stand among all of the run."""
        rows = self._everyone[at]
        return rows if isinstance(self._rows, slice) else self._rows[rows]

    def _input(self, x_adv: Tensor, at: Tensor | slice) -> Tensor:
        x_adv = x_adv[at].detach()
        return round_towards(x_adv, self._raw[at]) if x_adv.dtype != self._raw.dtype else x_adv

    def _forward(self, fn: Fn, x: Tensor, at: Tensor | slice) -> Any:
        """One counted pass; a copy goes in, so that a model that writes to its input harms nobody."""
        self._count(self._kept.ledger.forwards, at)
        if self._kept.checked:
            return fn(x.clone()) if len(x) > 1 else self._alone(fn, x)
        own = self._target.generators
        before = random_state(own)
        out = fn(x.clone()) if len(x) > 1 else self._alone(fn, x)
        self._kept.set_stochastic(stochastic=before != random_state(own))
        goal, ref = self._judged_by
        goal.check(out, ref[at])
        self._kept.first_output_checks = check_first_output(out)
        return out

    def _alone(self, fn: Fn, x: Tensor) -> Any:
        """What is said of one image; that the model could not do with one is told."""
        out, error = predict_one(fn, x)
        if error is not None:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            self.add_note("fails-alone", f"the model fails on a batch of one ({why}); it was asked about two")
        return out

    @torch.no_grad()
    def _judge(self, x_adv: Tensor, at: Tensor | slice) -> tuple[Any, Tensor]:
        """The output, and whether the goal is reached at `x_adv` for the examples `at`, by the deployed function."""
        out = self._forward(self._target.fn, self._input(x_adv, at), at)
        return out, self._offer(x_adv, at, out)

    def _offer(self, x_adv: Tensor, at: Tensor | slice, out: Any, loss: Tensor | None = None) -> Tensor:
        """Keep what is worth it of the points with these outputs; whether the goal is reached there."""
        goal, ref = self._judged_by
        reached = goal.success(out, ref[at])
        if loss is None and self._kept.compares_loss:
            loss = goal.loss(out, ref[at])
        if self._kept.compares_loss or (self._kept.tracks_best and reached.any()):  # on most steps nobody succeeds
            self._kept.update(self._in_ledger(at), x_adv[at].detach(), self.x[at], self.threat[at], reached, loss)
        return reached

    @property
    def _on_course(self) -> bool:
        """Whether the loss to follow is that of the goal which is judged by."""
        return self.goal is self._judged_by[0] and self.ref is self._judged_by[1]

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
        self._count(self._kept.ledger.backwards, at, self._target.draws)
        loss, grad = _mean(losses).to(self.x), _mean(grads).to(self.x)
        if self._kept.tracks_best:
            with torch.no_grad():
                self._judge_on_the_way(x_adv, at, out, loss if self._on_course else None)
        return loss, self._with_signal(grad, x_adv, at)

    def _gradient(self, loss: Tensor, x: Tensor, *, keep: bool = False) -> Tensor:
        """d sum(loss) / dx; zero where no path leads from x to the loss, or where autograd fails. `keep`: others will ask."""
        if not loss.requires_grad:
            return torch.zeros_like(x)
        try:
            (grad,) = torch.autograd.grad(loss.sum(), x, allow_unused=True, retain_graph=keep)
        except RuntimeError as error:  # a finding about the model, not a reason to stop
            if is_out_of_memory(error):
                raise
            self.record_check("broken-autograd", len(x), len(x), 0.0)
            return torch.zeros_like(x)
        return torch.zeros_like(x) if grad is None else grad.detach()

    def _judge_on_the_way(self, x_adv: Tensor, at: Tensor | slice, out: Any, loss: Tensor | None) -> None:
        """Judge the iterate by the output at hand where it is the deployed function's, by another pass where not."""
        if self._target.view is not self._target.fn:
            self._judge(x_adv, at)
        else:
            self._offer(x_adv, at, out, loss)

    def _with_signal(self, grad: Tensor, x_adv: Tensor, at: Tensor | slice) -> Tensor:
        """The gradient made finite; rows without signal are counted."""
        largest = abs_max(grad)
        low, high = (float(bound) for bound in torch.aminmax(largest)) if len(largest) else (1.0, 1.0)
        if low > 0 and high < math.inf:  # neither holds where one of them is not a number
            return grad
        flat = ~(largest.isfinite() & (largest > 0))
        if self.goal.vanishes_at_x:
            flat &= abs_max(x_adv[at] - self.x[at]) > 0
        self._count(self._kept.ledger.flat, at, flat.long())
        return torch.where(grad.isfinite(), grad, 0)


def _mean(draws: list[Tensor]) -> Tensor:
    return torch.stack(draws).mean(0) if len(draws) > 1 else draws[0]
