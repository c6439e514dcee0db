"""The interface of all attacks: how one is called, and what every call does besides running it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from robustkit._engine.best_so_far import BestSoFar, Keep, check_keep
from robustkit._engine.call import check_request, detached_copy, gradients_enabled, halve_to_fit, halving_notes, run_in_batches
from robustkit._engine.ledger import Ledger, Message, sum_checks
from robustkit._engine.noise import Noise
from robustkit._engine.state_guard import fork_rng
from robustkit._engine.tensors import at_least_float32, expand_rows, round_towards
from robustkit._engine.verdict import float32_note, verdict
from robustkit.errors import ArgumentError, ShapeError
from robustkit.flags import flags_and_notes
from robustkit.goals import Goal, Misclassify
from robustkit.problem import Problem
from robustkit.result import Result
from robustkit.target import Fn, Target
from robustkit.threats import Threat

__all__ = ["FLAT_GRADIENTS", "Attack", "flat_flag"]

FLAT_GRADIENTS = "flat-gradients"


class Attack(ABC):
    """A way to solve a Problem. Attacks are frozen dataclasses: the fields configure the method, the call states the problem.

    Attributes:
        access: What the attack uses of the target: its gradients ("white"), its outputs ("score") or its decision ("label").
        serves: The threat classes that it supports; empty if it supports all. Others are refused.
        universal: True if one perturbation serves all examples: it is learned from all of them before the first batch is
            attacked, and added to every example, also where the goal holds without it.
        minimum_norm: True if it minimises the size of the perturbation: one run then gives the robust accuracy at every eps
            up to its own.
    """

    access: ClassVar[Literal["white", "score", "label"]] = "white"
    serves: ClassVar[tuple[type[Threat], ...]] = ()
    universal: ClassVar[bool] = False
    minimum_norm: ClassVar[bool] = False

    @property
    def own_flags(self) -> tuple[Message, ...]:
        """Flags of the attack itself, which are added to each of its results."""
        return ()

    @abstractmethod
    def run(self, problem: Problem) -> Tensor:
        """Run the attack and return the last iterate, (N, *S); the problem keeps the best point that was queried."""

    def fitted(self, problem: Problem) -> Attack:
        """The attack with its universal perturbation learned from all examples; others return themselves.

        `problem` holds all examples, more than fit into a batch: iterate over `problem.batches(problem.batch_size)`.
        """
        return self

    def supports(self, threat: Threat) -> bool:
        """Whether this attack supports a threat."""
        return not self.serves or isinstance(threat, self.serves)

    def check(self, threat: Threat) -> None:
        """Refuse a threat that this attack does not support.

        Raises:
            ArgumentError: The threat is not supported; the message lists the threats that are.
        """
        if not self.supports(threat):
            names = ", ".join(kind.__name__ for kind in self.serves)
            raise ArgumentError(f"threat={threat!r} is not supported by {self!r}; it supports {names}")

    @final
    def __call__(
        self,
        target: Target | nn.Module | Fn,
        x: Tensor,
        ref: Tensor,
        *,
        goal: Goal = Misclassify(),
        threat: Threat,
        seed: int = 0,
        ids: Tensor | None = None,
        keep: Keep = "first",
        starts: Tensor | None = None,
    ) -> Result:
        """Attack every example and evaluate the result.

        Args:
            target: A module, a bound method of one, a function, or a `Target`.
            x: Inputs inside the threat's bounds, (N, *S), any floating-point dtype.
            ref: What the goal compares with, (N, ...): labels, target classes, embeddings, images.
            goal: What success means; the attack minimises its loss.
            threat: The allowed perturbations.
            seed: Any integer; the same seed gives the same bytes.
            ids: Ids of the examples, (N,) int64; each example draws its noise by its id. Default 0, 1, ... N - 1.
            keep: Which iterate is returned: the "first" that succeeds (solved examples are skipped from then on), the "best"
                by the goal's loss, the "smallest" success, or the "last".
            starts: Candidate points, (N, *S): adversarial examples of an earlier run, of a smaller budget, of another
                library. They are projected onto the threat and queried before the attack begins, in a stage "starts", at
                one forward pass per unsolved example; a row with a NaN is ignored. Not for universal attacks or with "last".

        Returns:
            A `Result` with one row per example, evaluated on the target's own function.

        Raises:
            ArgumentError: A value is outside its range, or inputs are outside the bounds.
            ShapeError: Tensors do not fit each other, or the goal cannot read the output.
        """
        check_keep(keep)
        self.check(threat)
        target, ids = Target.of(target), check_request(x, ref, goal, threat, seed, ids)
        self._check_starts(starts, x, keep)
        if not len(x):
            return Result.allocate(x.detach())
        flags = [*_flags(target), *self.own_flags]
        with gradients_enabled(), target.frozen():
            x, ref, starts = detached_copy(x), detached_copy(ref), None if starts is None else detached_copy(starts)
            buffer = Result.allocate(x)
            attack, learning_cost, halved = self._fit_if_universal(target, x, ref, goal, threat, Noise(int(seed), ids))

            def solve(rows: slice, batch_size: int) -> Result:
                noise = Noise(int(seed), ids[rows])
                with fork_rng(noise.at("model", int(noise.ids[0])).key):
                    part = attack._solve(
                        target.with_max_batch_size(batch_size),
                        threat.clamp(x[rows]),
                        ref[rows],
                        goal,
                        threat[rows],
                        noise,
                        keep,
                        None if starts is None else starts[rows].to(x.device),
                    )
                return buffer.write(rows, part)

            parts, notes = run_in_batches(solve, len(x), target.batch_size)
            result = buffer.with_messages(Result.cat(parts))
            notes += halved
            result = result if learning_cost is None else result.plus_cost(learning_cost)
            if x.element_size() < 4:
                notes.append(float32_note(target, result.x_adv, ref, goal, result.success))
        diagnostic_flags, diagnostic_notes = flags_and_notes(result.checks)
        flags += [*result.flags, *flat_flag(result), *diagnostic_flags]
        return replace(result, flags=tuple(flags), notes=(*notes, *result.notes, *diagnostic_notes))

    @final
    def perturb(
        self,
        target: Target | nn.Module | Fn,
        x: Tensor,
        ref: Tensor,
        *,
        goal: Goal = Misclassify(),
        threat: Threat,
        seed: int = 0,
        ids: Tensor | None = None,
    ) -> Tensor:
        """The last iterates, (N, *S), without evaluation, for adversarial training. Arguments as for `__call__`."""
        self.check(threat)
        target, ids = Target.of(target), check_request(x, ref, goal, threat, seed, ids)
        if not len(x):
            return x.detach().clone()
        with gradients_enabled(), target.frozen():
            x, ref = detached_copy(x), detached_copy(ref)
            attack = self._fit_if_universal(target, x, ref, goal, threat, Noise(int(seed), ids))[0]

            def solve(rows: slice, batch_size: int) -> Tensor:
                part, noise = threat.clamp(x[rows]), Noise(int(seed), ids[rows])
                best = BestSoFar("last", at_least_float32(part), target.stochastic)
                problem = Problem(target.with_max_batch_size(batch_size), part, ref[rows], goal, threat[rows], noise, best)
                with fork_rng(noise.at("model", int(noise.ids[0])).key), attack._inputs_unchanged(problem):
                    return _into_threat(problem, attack.run(problem), part)

            return torch.cat(run_in_batches(solve, len(x), target.batch_size)[0])

    @final
    def _fit_checked(
        self, target: Target | nn.Module | Fn, x: Tensor, ref: Tensor, goal: Goal, threat: Threat, seed: int, ids: Tensor | None
    ) -> tuple[Attack, Ledger | None]:
        """What `_fit_if_universal` returns, for a caller outside a run: the arguments are checked first."""
        self.check(threat)
        target, ids = Target.of(target), check_request(x, ref, goal, threat, seed, ids)
        with gradients_enabled(), target.frozen():
            return self._fit_if_universal(target, detached_copy(x), detached_copy(ref), goal, threat, Noise(int(seed), ids))[:2]

    @final
    def _check_starts(self, starts: Tensor | None, x: Tensor, keep: Keep) -> None:
        """Refuse starts of a wrong shape or type, and starts that the attack could not use."""
        if starts is None:
            return
        if not isinstance(starts, Tensor) or starts.shape != x.shape or not starts.is_floating_point():
            given = f"{starts.dtype} of shape {tuple(starts.shape)}" if isinstance(starts, Tensor) else type(starts).__name__
            raise ShapeError(
                f"starts are {given}; they must be a floating-point tensor of the shape of x, {tuple(x.shape)}, with NaN in "
                "the rows of examples that have none"
            )
        if self.universal or keep == "last":
            why = (
                "adds one perturbation to every example"
                if self.universal
                else 'returns its last iterates alone with keep="last"'
            )
            raise ArgumentError(f"starts are of no use: {self!r} {why}; leave them out")

    @final
    @contextmanager
    def _inputs_unchanged(self, problem: Problem) -> Iterator[None]:
        """Refuse an attack that writes to the clean inputs or the reference, which define its success."""
        before = problem.version
        yield
        if problem.version != before:
            raise ArgumentError(
                f"{self!r} wrote to problem.x or problem.ref, which define its success; it must work on a clone"
            )

    @final
    def _fit_if_universal(
        self, target: Target, x: Tensor, ref: Tensor, goal: Goal, threat: Threat, noise: Noise
    ) -> tuple[Attack, Ledger | None, list[Message]]:
        """The attack to run on each batch, the cost of learning its perturbation, and notes about that."""
        if not self.universal:
            return self, None, []

        def learn(batch_size: int) -> tuple[Attack, Ledger]:
            best = BestSoFar("last", at_least_float32(x), target.stochastic)
            problem = Problem(target.with_max_batch_size(batch_size), x, ref, goal, threat, noise, best)
            with fork_rng(noise.at("model", "learning").key), self._inputs_unchanged(problem):
                return self.fitted(problem), best.ledger

        (attack, ledger), batch_size = halve_to_fit(learn, target.batch_size, len(x))
        return attack, ledger, halving_notes(target.batch_size, batch_size)

    @final
    def _solve(
        self,
        target: Target,
        x: Tensor,
        ref: Tensor,
        goal: Goal,
        threat: Threat,
        noise: Noise,
        keep: Keep,
        starts: Tensor | None,
    ) -> Result:
        """Attack one batch: query the clean inputs, query the starts, run the attack, evaluate what it found."""
        best = BestSoFar(keep, at_least_float32(x), target.stochastic)
        problem = Problem(target, x, ref, goal, threat, noise, best)
        initially_successful = torch.zeros_like(best.unsolved)
        if goal.counts_if_already_true and keep in ("first", "smallest") and not self.universal:
            with problem.stage("clean"):
                initially_successful = problem.success(problem.x)
                initially_successful &= not best.stochastic  # known only now: one lucky draw is not a success
                best.unsolved &= ~initially_successful
        if starts is not None:
            with problem.stage("starts"):
                _query_starts(problem, starts)
        with problem.stage("attack"):
            with self._inputs_unchanged(problem):
                x_last = self.run(problem) if best.unsolved.any() else problem.x
            x_last = _into_threat(problem, x_last, problem.x)
            x_adv, success, rate, flags, notes = verdict(problem, best, x_last, initially_successful)
            best.best.success[:] = success  # so that the stage records the final successes
        x_adv = _into_threat(problem, x_adv, x)
        ledger = best.ledger
        return Result(
            x_adv,
            success,
            rate,
            threat.size(x_adv, x),
            ledger.forwards,
            ledger.backwards,
            ledger.flat,
            tuple(flags),
            (*notes, *ledger.notes),
            stages=tuple(ledger.stages),
            solver=torch.where(success, ledger.solver, -1),
            checks=sum_checks(best.checks),
        )


def _query_starts(problem: Problem, starts: Tensor) -> None:
    """Query the starts of the unsolved examples; successes are kept like those of any other point."""
    rows = (starts.isfinite().flatten(1).all(1) & problem.unsolved).nonzero().squeeze(1)
    if len(rows):
        part = problem[rows]
        part.success(_into_threat(part, starts[rows], part.x))


def _into_threat(problem: Problem, x_adv: Tensor, like: Tensor) -> Tensor:
    """`x_adv` (N, *S) inside the threat, detached, in the dtype of `like`; NaN becomes the clean value."""
    if x_adv.shape != problem.x.shape:
        raise ShapeError(f"the attack returned shape {tuple(x_adv.shape)} for inputs {tuple(problem.x.shape)}")
    x_adv = torch.where(x_adv.isnan(), problem.x, x_adv.to(problem.x.dtype)).detach()
    inside = problem.threat.contains(x_adv, problem.x)
    if not inside.all():
        x_adv = torch.where(expand_rows(inside, x_adv), x_adv, problem.threat.project(x_adv, problem.x))
    return x_adv if x_adv.dtype == like.dtype else round_towards(x_adv, like)


def _flags(target: Target) -> list[Message]:
    if target.mode == "eval" and target.in_training:
        return [Message("train-mode", "the model arrived in training mode; it was attacked in evaluation mode")]
    return []


def flat_flag(result: Result) -> list[Message]:
    """A flag where more than half of the gradients of the examples that resisted had no signal."""
    robust = ~result.success
    gradients, flat = int(result.backwards[robust].sum()), int(result.flat[robust].sum())
    if flat <= gradients / 2:
        return []
    why = f"{flat} of {gradients} gradients of the unsolved examples were zero, not finite or missing; unsolved is not robust"
    return [Message(FLAT_GRADIENTS, why)]
