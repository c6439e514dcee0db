"""How an attack is run: it solves a Problem; all that surrounds this is here, once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar, Literal, SupportsIndex, TypeVar, final

import torch
from torch import Tensor, nn

from robustkit._random import Noise
from robustkit._tensors import over, toward, wide
from robustkit._world import is_out_of_memory, seeded
from robustkit.errors import ArgumentError, ShapeError
from robustkit.goals import Goal, Misclassify
from robustkit.keep import Keep, Kept, check_keep
from robustkit.ledger import Ledger, Remark
from robustkit.problem import Problem
from robustkit.result import Result
from robustkit.target import Fn, Target
from robustkit.threats import Threat
from robustkit.verdict import told_in_float32, verdict

__all__ = ["FLAT", "Attack", "flat_flag"]

FLAT = "flat-gradients"

T = TypeVar("T")


class Attack(ABC):
    """A way to solve a Problem. Concrete attacks are frozen dataclasses: the fields are the method, the call is the problem.

    Attributes:
        access: What the attack sees of the target: its gradients ("white"), its outputs ("score") or its decision ("label").
        serves: The kinds of threat that it works with; empty where it works with any. Others are refused.
        universal: True where one change serves all examples: it is learned before any batch is attacked, and put on
            every example, also where the goal holds anyway.
    """

    access: ClassVar[Literal["white", "score", "label"]] = "white"
    serves: ClassVar[tuple[type[Threat], ...]] = ()
    universal: ClassVar[bool] = False

    @abstractmethod
    def run(self, problem: Problem) -> Tensor:
        """The last iterate, (N, *S); what was visited on the way is kept by the problem."""

    def learned(self, problem: Problem) -> Attack:
        """What a universal attack puts on every example, learned from all of them; nothing is judged on the way.

        `problem` holds all examples, more than go through the model at once: `problem.batches(problem.most)` do.
        """
        return self

    def check(self, threat: Threat) -> None:
        """Refuse a threat that this attack does not serve.

        Raises:
            ArgumentError: With the threats that it serves.
        """
        if self.serves and not isinstance(threat, self.serves):
            names = ", ".join(kind.__name__ for kind in self.serves)
            raise ArgumentError(f"threat={threat!r} is not served by {self!r}; it serves {names}")

    @final
    def __call__(self, target: Target | nn.Module | Fn, x: Tensor, ref: Tensor, *, goal: Goal = Misclassify(),
                 threat: Threat, seed: int = 0, ids: Tensor | None = None, keep: Keep = "first") -> Result:  # fmt: skip
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

        Returns:
            A `Result`, a row an example, judged on the target's own function.

        Raises:
            ArgumentError: A value outside its range, inputs outside the bounds among them.
            ShapeError: Tensors that do not fit each other, or an output that the goal cannot read.
        """
        check_keep(keep)
        self.check(threat)
        target, ids = Target.of(target), _checked(x, ref, goal, threat, seed, ids)
        if not len(x):
            return Result.room(x.detach())
        flags = _flags(target)
        with _gradients_on(), target.held():
            x, ref = _owned(x), _owned(ref)
            room = Result.room(x)
            attack, spent, halved = self._ready(target, x, ref, goal, threat, Noise(int(seed), ids))

            def solve(rows: slice, most: int) -> Result:
                noise = Noise(int(seed), ids[rows])
                with seeded(noise.at("model", int(noise.ids[0])).key):
                    part = attack._solve(
                        target.fitting(most), threat.clamp(x[rows]), ref[rows], goal, threat[rows], noise, keep
                    )
                return room.fill(rows, part)

            parts, notes = _in_batches(solve, len(x), target.batch_size)
            told = Result.cat(parts)
            whole = replace(room, flags=told.flags, notes=(*halved, *told.notes), stages=told.stages)
            whole = whole if spent is None else whole.after(spent)
            if x.element_size() < 4:
                notes.append(told_in_float32(target, whole.x_adv, ref, goal, whole.success))
        return replace(whole, flags=(*flags, *whole.flags, *flat_flag(whole)), notes=(*notes, *whole.notes))

    @final
    def perturb(self, target: Target | nn.Module | Fn, x: Tensor, ref: Tensor, *, goal: Goal = Misclassify(),
                threat: Threat, seed: int = 0, ids: Tensor | None = None) -> Tensor:  # fmt: skip
        """The last iterates alone, (N, *S), judged by nobody: what adversarial training needs. Arguments as above."""
        self.check(threat)
        target, ids = Target.of(target), _checked(x, ref, goal, threat, seed, ids)
        if not len(x):
            return x.detach().clone()
        with _gradients_on(), target.held():
            x, ref = _owned(x), _owned(ref)
            attack = self._ready(target, x, ref, goal, threat, Noise(int(seed), ids))[0]

            def solve(rows: slice, most: int) -> Tensor:
                part, noise = threat.clamp(x[rows]), Noise(int(seed), ids[rows])
                kept = Kept("last", wide(part), target.stochastic)
                problem = Problem(target.fitting(most), part, ref[rows], goal, threat[rows], noise, kept)
                with seeded(noise.at("model", int(noise.ids[0])).key):
                    return _finished(problem, attack.run(problem), part)

            return torch.cat(_in_batches(solve, len(x), target.batch_size)[0])

    @final
    def _ready(self, target: Target, x: Tensor, ref: Tensor, goal: Goal, threat: Threat,
               noise: Noise) -> tuple[Attack, Ledger | None, list[Remark]]:  # fmt: skip
        """What is run on each batch, what learning it has cost, and what is to be told of it."""
        if not self.universal:
            return self, None, []

        def learn(most: int) -> tuple[Attack, Ledger]:
            kept = Kept("last", wide(x), target.stochastic)
            with seeded(noise.at("model", "learning").key):
                return self.learned(Problem(target.fitting(most), x, ref, goal, threat, noise, kept)), kept.ledger

        (attack, ledger), most = _halving(learn, target.batch_size, len(x))
        return attack, ledger, _halved(target.batch_size, most)

    @final
    def _solve(self, target: Target, x: Tensor, ref: Tensor, goal: Goal, threat: Threat, noise: Noise,
               keep: Keep) -> Result:  # fmt: skip
        kept = Kept(keep, wide(x), target.stochastic)
        problem = Problem(target, x, ref, goal, threat, noise, kept)
        stage = kept.ledger.stage
        met = torch.zeros_like(kept.open)
        if goal.met_before and keep in ("first", "smallest") and not self.universal:
            with stage("clean", kept.best.found):
                met = problem.success(problem.x)
                met &= not kept.stochastic  # known only now: a lucky answer is no success
                kept.open &= ~met
        with stage("attack", kept.best.found):
            x_last = self.run(problem) if kept.open.any() else problem.x
            x_adv, success, rate, flags, notes = verdict(problem, kept, _finished(problem, x_last, problem.x), met)
            kept.best.found[:] = success  # so that the stage books what was solved in the end
        x_adv = _finished(problem, x_adv, x)
        ledger = kept.ledger
        return Result(x_adv, success, rate, threat.size(x_adv, x), ledger.forwards, ledger.backwards, ledger.flat,
                      tuple(flags), tuple(notes), stages=tuple(ledger.stages))  # fmt: skip


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


def _in_batches(solve: Callable[[slice, int], T], n: int, size: int) -> tuple[list[T], list[Remark]]:
    """`solve` for every slice of at most `size` rows; where memory runs out, half the size is tried from there on."""
    parts, start, most = [], 0, size
    while start < n:
        part, most = _halving(lambda rows, first=start: solve(slice(first, min(first + rows, n)), rows), most, n - start)  # type: ignore[misc]
        parts.append(part)
        start += most
    return parts, _halved(size, most)


def _halving(work: Callable[[int], T], size: int, n: int) -> tuple[T, int]:
    """`work` on n images with the most at once, `size` or as many as memory allows; and how many these were."""
    while True:
        try:
            return work(size), size
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            size = -(-min(size, n) // 2)


def _halved(wanted: int, most: int) -> list[Remark]:
    return [] if most == wanted else [Remark("batch-halved", f"memory ran out; the last batches held {most} images")]


@contextmanager
def _gradients_on() -> Iterator[None]:
    """Gradients are taken wherever the caller stands, inside torch.no_grad() and torch.inference_mode() too."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _owned(x: Tensor) -> Tensor:
    """`x` without its history, as an ordinary tensor."""
    x = x.detach()
    return x.clone() if x.is_inference() else x


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


def _checked(x: Tensor, ref: Tensor, goal: Goal, threat: Threat, seed: int, ids: Tensor | None) -> Tensor:
    """The ids, after a look at everything that can be seen to be wrong before any work."""
    for name, value, kind, example in (("goal", goal, Goal, "ClassifyAs()"), ("threat", threat, Threat, "Linf(8 / 255)")):
        if not isinstance(value, kind):
            raise ArgumentError(f"{name}={value!r} must be a {kind.__name__}, for example {example}")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ArgumentError(f"x is {found}; inputs must be a floating-point tensor (byte images: x.float() / 255)")
    if x.dim() < 2 or (not x[:1].numel() and len(x)):
        raise ShapeError(f"x has shape {tuple(x.shape)}; inputs must be (N, *S) with at least one value an example")
    if not isinstance(ref, Tensor) or ref.shape[:1] != x.shape[:1]:
        shape = tuple(ref.shape) if isinstance(ref, Tensor) else type(ref).__name__
        raise ShapeError(f"ref is {shape}, x is {tuple(x.shape)}; both must be tensors with one row an example")
    if not isinstance(seed, SupportsIndex):
        raise ArgumentError(f"seed={seed!r} must be an integer")
    _check_eps(threat, x)
    _check_range(threat, x)
    if ids is None:
        return torch.arange(len(x), device=x.device)
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.shape != x.shape[:1]:
        given = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ShapeError(f"ids are {given}; they must be an int64 tensor of shape ({len(x)},)")
    return ids.to(x.device)


def _check_eps(threat: Threat, x: Tensor) -> None:
    if isinstance(threat.eps, Tensor) and threat.eps.dim() and threat.eps.shape != x.shape[:1]:
        raise ShapeError(f"eps has shape {tuple(threat.eps.shape)}; it must be one number, or one an example: ({len(x)},)")


def _check_range(threat: Threat, x: Tensor) -> None:
    """Refuse values outside the bounds, but for one rounding in the type of x."""
    if not len(x):
        return
    low, high = (float(v) for v in torch.aminmax(x.detach()))
    lowest, highest = threat.bounds or (-torch.inf, torch.inf)
    slack = torch.finfo(x.dtype).eps * max(abs(lowest), abs(highest)) if threat.bounds else 0.0
    if not (lowest - slack <= low and high <= highest + slack and low > -torch.inf and high < torch.inf):
        raise ArgumentError(
            f"x has values from {low:g} to {high:g}, outside bounds={threat.bounds}; give images as the model's user "
            "would, with the normalisation inside the model, or state the true bounds in the threat"
        )
