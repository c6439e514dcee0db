"""How an attack is run: it solves a Problem; all that surrounds this is here, once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from robustkit._engine.best_so_far import BestSoFar, Keep, check_keep
from robustkit._engine.call import check_request, detached_copy, gradients_enabled, halved, run_in_batches, with_halving
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
    """A way to solve a Problem. Concrete attacks are frozen dataclasses: the fields are the method, the call is the problem.

    Attributes:
        access: What the attack sees of the target: its gradients ("white"), its outputs ("score") or its decision ("label").
        serves: The kinds of threat that it works with; empty where it works with any. Others are refused.
        universal: True where one change serves all examples: it is learned before any batch is attacked, and put on
            every example, also where the goal holds anyway.
        smallest: True where it looks for the smallest change: one run then tells robust accuracy for every eps up to its own.
    """

    access: ClassVar[Literal["white", "score", "label"]] = "white"
    serves: ClassVar[tuple[type[Threat], ...]] = ()
    universal: ClassVar[bool] = False
    minimum_norm: ClassVar[bool] = False

    @property
    def own_flags(self) -> tuple[Message, ...]:
        """Reasons not to believe in the attack itself, which every result of it tells as flags."""
        return ()

    @abstractmethod
    def run(self, problem: Problem) -> Tensor:
        """The last iterate, (N, *S); what was visited on the way is kept by the problem."""

    def fitted(self, problem: Problem) -> Attack:
        """What a universal attack puts on every example, learned from all of them; nothing is judged on the way.

        `problem` holds all examples, more than go through the model at once: `problem.batches(problem.most)` do.
        """
        return self

    def supports(self, threat: Threat) -> bool:
        """Whether this attack serves a threat."""
        return not self.serves or isinstance(threat, self.serves)

    def check(self, threat: Threat) -> None:
        """Refuse a threat that this attack does not serve.

        Raises:
            ArgumentError: With the threats that it serves.
        """
        if not self.supports(threat):
            names = ", ".join(kind.__name__ for kind in self.serves)
            raise ArgumentError(f"threat={threat!r} is not served by {self!r}; it serves {names}")

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
        """Attack every example and judge the outcome.

        Args:
            target: A module, a bound method of one, a function, or a `Target`.
            x: Inputs inside the threat's bounds, (N, *S), any floating type.
            ref: What the goal compares with, (N, ...): labels, wanted classes, embeddings, images.
            goal: What success means; the attack descends its loss.
            threat: What may change.
            seed: Any integer; the same seed gives the same bytes.
            ids: Names of the examples, (N,) int64; noise belongs to them. Default 0, 1, ... N - 1.
            keep: Which iterate comes back: "first" that succeeds (solved examples leave at once), "best" by the goal's
                loss, "smallest" success, or "last".
            starts: Points that are worth a look, (N, *S): adversarial examples of an earlier run, of a smaller budget, of
                another library. They are brought into the threat and asked before the attack begins, in a stage "starts",
                one forward an open example; a row with a NaN stands for none. Not for universal attacks, nor with "last".

        Returns:
            A `Result`, a row an example, judged on the target's own function.

        Raises:
            ArgumentError: A value outside its range, inputs outside the bounds among them.
            ShapeError: Tensors that do not fit each other, or an output that the goal cannot read.
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
            room = Result.allocate(x)
            attack, spent, halved = self._ready(target, x, ref, goal, threat, Noise(int(seed), ids))

            def solve(rows: slice, most: int) -> Result:
                noise = Noise(int(seed), ids[rows])
                with fork_rng(noise.at("model", int(noise.ids[0])).key):
                    part = attack._solve(
                        target.fitting(most),
                        threat.clamp(x[rows]),
                        ref[rows],
                        goal,
                        threat[rows],
                        noise,
                        keep,
                        None if starts is None else starts[rows].to(x.device),
                    )
                return room.write(rows, part)

            parts, notes = run_in_batches(solve, len(x), target.batch_size)
            whole = room.with_messages(Result.cat(parts))
            notes += halved
            whole = whole if spent is None else whole.plus_cost(spent)
            if x.element_size() < 4:
                notes.append(float32_note(target, whole.x_adv, ref, goal, whole.success))
        alarms, facts = flags_and_notes(whole.checks)
        return replace(whole, flags=(*flags, *whole.flags, *flat_flag(whole), *alarms), notes=(*notes, *whole.notes, *facts))

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
        """The last iterates alone, (N, *S), judged by nobody: what adversarial training needs. Arguments as above."""
        self.check(threat)
        target, ids = Target.of(target), check_request(x, ref, goal, threat, seed, ids)
        if not len(x):
            return x.detach().clone()
        with gradients_enabled(), target.frozen():
            x, ref = detached_copy(x), detached_copy(ref)
            attack = self._ready(target, x, ref, goal, threat, Noise(int(seed), ids))[0]

            def solve(rows: slice, most: int) -> Tensor:
                part, noise = threat.clamp(x[rows]), Noise(int(seed), ids[rows])
                kept = BestSoFar("last", at_least_float32(part), target.stochastic)
                problem = Problem(target.fitting(most), part, ref[rows], goal, threat[rows], noise, kept)
                with fork_rng(noise.at("model", int(noise.ids[0])).key), attack._reading(problem):
                    return _finished(problem, attack.run(problem), part)

            return torch.cat(run_in_batches(solve, len(x), target.batch_size)[0])

    @final
    def _prepared(
        self, target: Target | nn.Module | Fn, x: Tensor, ref: Tensor, goal: Goal, threat: Threat, seed: int, ids: Tensor | None
    ) -> tuple[Attack, Ledger | None]:
        """What `_ready` gives, for a caller outside of a run."""
        self.check(threat)
        target, ids = Target.of(target), check_request(x, ref, goal, threat, seed, ids)
        with gradients_enabled(), target.frozen():
            return self._ready(target, detached_copy(x), detached_copy(ref), goal, threat, Noise(int(seed), ids))[:2]

    @final
    def _check_starts(self, starts: Tensor | None, x: Tensor, keep: Keep) -> None:
        """Refuse starts that do not fit, and those that could not count."""
        if starts is None:
            return
        if not isinstance(starts, Tensor) or starts.shape != x.shape or not starts.is_floating_point():
            given = f"{starts.dtype} of shape {tuple(starts.shape)}" if isinstance(starts, Tensor) else type(starts).__name__
            raise ShapeError(
                f"starts are {given}; they must be a floating-point tensor of the shape of x, {tuple(x.shape)}, with NaN in "
                "the rows of examples that have none"
            )
        if self.universal or keep == "last":
            why = "puts one change on every example" if self.universal else 'returns its last iterates alone with keep="last"'
            raise ArgumentError(f"starts are of no use: {self!r} {why}; leave them out")

    @final
    @contextmanager
    def _reading(self, problem: Problem) -> Iterator[None]:
        """Refuse an attack that writes to what it was only to read, and by which it is judged."""
        before = problem.version
        yield
        if problem.version != before:
            raise ArgumentError(f"{self!r} wrote to problem.x or problem.ref, by which it is judged; it must work on a clone")

    @final
    def _ready(
        self, target: Target, x: Tensor, ref: Tensor, goal: Goal, threat: Threat, noise: Noise
    ) -> tuple[Attack, Ledger | None, list[Message]]:
        """What is run on each batch, what learning it has cost, and what is to be told of it."""
        if not self.universal:
            return self, None, []

        def learn(most: int) -> tuple[Attack, Ledger]:
            kept = BestSoFar("last", at_least_float32(x), target.stochastic)
            problem = Problem(target.fitting(most), x, ref, goal, threat, noise, kept)
            with fork_rng(noise.at("model", "learning").key), self._reading(problem):
                return self.fitted(problem), kept.ledger

        (attack, ledger), most = with_halving(learn, target.batch_size, len(x))
        return attack, ledger, halved(target.batch_size, most)

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
        kept = BestSoFar(keep, at_least_float32(x), target.stochastic)
        problem = Problem(target, x, ref, goal, threat, noise, kept)
        stage = kept.ledger.stage
        met = torch.zeros_like(kept.unsolved)
        if goal.counts_if_already_true and keep in ("first", "smallest") and not self.universal:
            with stage("clean", kept.best.found):
                met = problem.success(problem.x)
                met &= not kept.stochastic  # known only now: a lucky answer is no success
                kept.unsolved &= ~met
        if starts is not None:
            with stage("starts", kept.best.found):
                _look(problem, starts)
        with stage("attack", kept.best.found):
            with self._reading(problem):
                x_last = self.run(problem) if kept.unsolved.any() else problem.x
            x_adv, success, rate, flags, notes = verdict(problem, kept, _finished(problem, x_last, problem.x), met)
            kept.best.found[:] = success  # so that the stage books what was solved in the end
        x_adv = _finished(problem, x_adv, x)
        ledger = kept.ledger
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
            checks=sum_checks(kept.checks),
        )


def _look(problem: Problem, starts: Tensor) -> None:
    """Ask about the starts of the examples that are open; what succeeds is kept like any other point."""
    rows = (starts.isfinite().flatten(1).all(1) & problem.unsolved).nonzero().squeeze(1)
    if len(rows):
        some = problem[rows]
        some.success(_finished(some, starts[rows], some.x))


def _finished(problem: Problem, x_adv: Tensor, like: Tensor) -> Tensor:
    """`x_adv` inside the threat, detached, in the type of `like`."""
    if x_adv.shape != problem.x.shape:
        raise ShapeError(f"the attack returned shape {tuple(x_adv.shape)} for inputs {tuple(problem.x.shape)}")
    # Not a number is no image: a search that got lost ends at x.
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
    """An alarm where most gradients of the examples that were not broken carried no signal."""
    robust = ~result.success
    asked, flat = int(result.backwards[robust].sum()), int(result.flat[robust].sum())
    if flat <= asked / 2:
        return []
    why = f"{flat} of {asked} gradients of the unbroken examples were zero, not finite or missing: not broken is not robust"
    return [Message(FLAT_GRADIENTS, why)]
