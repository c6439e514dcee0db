"""How an attack is run: it solves a Problem; all that surrounds this is here, once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from robustkit._engine.best_so_far import Keep, Kept, check_keep
from robustkit._engine.call import checked, gradients_on, halved, halving, in_batches, owned
from robustkit._engine.ledger import Ledger, Remark, summed
from robustkit._engine.noise import Noise
from robustkit._engine.state_guard import seeded
from robustkit._engine.tensors import over, toward, wide
from robustkit._engine.verdict import told_in_float32, verdict
from robustkit.errors import ArgumentError, ShapeError
from robustkit.flags import judged
from robustkit.goals import Goal, Misclassify
from robustkit.problem import Problem
from robustkit.result import Result
from robustkit.target import Fn, Target
from robustkit.threats import Threat

__all__ = ["FLAT", "Attack", "flat_flag"]

FLAT = "flat-gradients"


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
    smallest: ClassVar[bool] = False

    @property
    def alarms(self) -> tuple[Remark, ...]:
        """Reasons not to believe in the attack itself, which every result of it tells as flags."""
        return ()

    @abstractmethod
    def run(self, problem: Problem) -> Tensor:
        """The last iterate, (N, *S); what was visited on the way is kept by the problem."""

    def learned(self, problem: Problem) -> Attack:
        """What a universal attack puts on every example, learned from all of them; nothing is judged on the way.

        `problem` holds all examples, more than go through the model at once: `problem.batches(problem.most)` do.
        """
        return self

    def fits(self, threat: Threat) -> bool:
        """Whether this attack serves a threat."""
        return not self.serves or isinstance(threat, self.serves)

    def check(self, threat: Threat) -> None:
        """Refuse a threat that this attack does not serve.

        Raises:
            ArgumentError: With the threats that it serves.
        """
        if not self.fits(threat):
            names = ", ".join(kind.__name__ for kind in self.serves)
            raise ArgumentError(f"threat={threat!r} is not served by {self!r}; it serves {names}")

    @final
    def __call__(self, target: Target | nn.Module | Fn, x: Tensor, ref: Tensor, *, goal: Goal = Misclassify(),
                 threat: Threat, seed: int = 0, ids: Tensor | None = None, keep: Keep = "first",
                 starts: Tensor | None = None) -> Result:  # fmt: skip
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
        target, ids = Target.of(target), checked(x, ref, goal, threat, seed, ids)
        self._check_starts(starts, x, keep)
        if not len(x):
            return Result.room(x.detach())
        flags = [*_flags(target), *self.alarms]
        with gradients_on(), target.held():
            x, ref, starts = owned(x), owned(ref), None if starts is None else owned(starts)
            room = Result.room(x)
            attack, spent, halved = self._ready(target, x, ref, goal, threat, Noise(int(seed), ids))

            def solve(rows: slice, most: int) -> Result:
                noise = Noise(int(seed), ids[rows])
                with seeded(noise.at("model", int(noise.ids[0])).key):
                    part = attack._solve(
                        target.fitting(most), threat.clamp(x[rows]), ref[rows], goal, threat[rows], noise, keep,
                        None if starts is None else starts[rows].to(x.device),
                    )  # fmt: skip
                return room.fill(rows, part)

            parts, notes = in_batches(solve, len(x), target.batch_size)
            whole = room.told(Result.cat(parts))
            notes += halved
            whole = whole if spent is None else whole.after(spent)
            if x.element_size() < 4:
                notes.append(told_in_float32(target, whole.x_adv, ref, goal, whole.success))
        alarms, facts = judged(whole.evidence)
        return replace(whole, flags=(*flags, *whole.flags, *flat_flag(whole), *alarms), notes=(*notes, *whole.notes, *facts))

    @final
    def perturb(self, target: Target | nn.Module | Fn, x: Tensor, ref: Tensor, *, goal: Goal = Misclassify(),
                threat: Threat, seed: int = 0, ids: Tensor | None = None) -> Tensor:  # fmt: skip
        """The last iterates alone, (N, *S), judged by nobody: what adversarial training needs. Arguments as above."""
        self.check(threat)
        target, ids = Target.of(target), checked(x, ref, goal, threat, seed, ids)
        if not len(x):
            return x.detach().clone()
        with gradients_on(), target.held():
            x, ref = owned(x), owned(ref)
            attack = self._ready(target, x, ref, goal, threat, Noise(int(seed), ids))[0]

            def solve(rows: slice, most: int) -> Tensor:
                part, noise = threat.clamp(x[rows]), Noise(int(seed), ids[rows])
                kept = Kept("last", wide(part), target.stochastic)
                problem = Problem(target.fitting(most), part, ref[rows], goal, threat[rows], noise, kept)
                with seeded(noise.at("model", int(noise.ids[0])).key), attack._reading(problem):
                    return _finished(problem, attack.run(problem), part)

            return torch.cat(in_batches(solve, len(x), target.batch_size)[0])

    @final
    def _prepared(self, target: Target | nn.Module | Fn, x: Tensor, ref: Tensor, goal: Goal, threat: Threat, seed: int,
                  ids: Tensor | None) -> tuple[Attack, Ledger | None]:  # fmt: skip
        """What `_ready` gives, for a caller outside of a run."""
        self.check(threat)
        target, ids = Target.of(target), checked(x, ref, goal, threat, seed, ids)
        with gradients_on(), target.held():
            return self._ready(target, owned(x), owned(ref), goal, threat, Noise(int(seed), ids))[:2]

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
        before = problem.stamp
        yield
        if problem.stamp != before:
            raise ArgumentError(f"{self!r} wrote to problem.x or problem.ref, by which it is judged; it must work on a clone")

    @final
    def _ready(self, target: Target, x: Tensor, ref: Tensor, goal: Goal, threat: Threat,
               noise: Noise) -> tuple[Attack, Ledger | None, list[Remark]]:  # fmt: skip
        """What is run on each batch, what learning it has cost, and what is to be told of it."""
        if not self.universal:
            return self, None, []

        def learn(most: int) -> tuple[Attack, Ledger]:
            kept = Kept("last", wide(x), target.stochastic)
            problem = Problem(target.fitting(most), x, ref, goal, threat, noise, kept)
            with seeded(noise.at("model", "learning").key), self._reading(problem):
                return self.learned(problem), kept.ledger

        (attack, ledger), most = halving(learn, target.batch_size, len(x))
        return attack, ledger, halved(target.batch_size, most)

    @final
    def _solve(self, target: Target, x: Tensor, ref: Tensor, goal: Goal, threat: Threat, noise: Noise,
               keep: Keep, starts: Tensor | None) -> Result:  # fmt: skip
        kept = Kept(keep, wide(x), target.stochastic)
        problem = Problem(target, x, ref, goal, threat, noise, kept)
        stage = kept.ledger.stage
        met = torch.zeros_like(kept.open)
        if goal.met_before and keep in ("first", "smallest") and not self.universal:
            with stage("clean", kept.best.found):
                met = problem.success(problem.x)
                met &= not kept.stochastic  # known only now: a lucky answer is no success
                kept.open &= ~met
        if starts is not None:
            with stage("starts", kept.best.found):
                _look(problem, starts)
        with stage("attack", kept.best.found):
            with self._reading(problem):
                x_last = self.run(problem) if kept.open.any() else problem.x
            x_adv, success, rate, flags, notes = verdict(problem, kept, _finished(problem, x_last, problem.x), met)
            kept.best.found[:] = success  # so that the stage books what was solved in the end
        x_adv = _finished(problem, x_adv, x)
        ledger = kept.ledger
        return Result(x_adv, success, rate, threat.size(x_adv, x), ledger.forwards, ledger.backwards, ledger.flat,
                      tuple(flags), (*notes, *ledger.notes), stages=tuple(ledger.stages),
                      solver=torch.where(success, ledger.solver, -1), evidence=summed(kept.evidence))  # fmt: skip


def _look(problem: Problem, starts: Tensor) -> None:
    """Ask about the starts of the examples that are open; what succeeds is kept like any other point."""
    rows = (starts.isfinite().flatten(1).all(1) & problem.open).nonzero().squeeze(1)
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
        x_adv = torch.where(over(inside, x_adv), x_adv, problem.threat.project(x_adv, problem.x))
    return x_adv if x_adv.dtype == like.dtype else toward(x_adv, like)


def _flags(target: Target) -> list[Remark]:
    if target.mode == "eval" and target.in_training:
        return [Remark("train-mode", "the model arrived in training mode; it was attacked in evaluation mode")]
    return []


def flat_flag(result: Result) -> list[Remark]:
    """An alarm where most gradients of the examples that were not broken carried no signal."""
    robust = ~result.success
    asked, flat = int(result.backwards[robust].sum()), int(result.flat[robust].sum())
    if flat <= asked / 2:
        return []
    why = f"{flat} of {asked} gradients of the unbroken examples were zero, not finite or missing: not broken is not robust"
    return [Remark(FLAT, why)]
