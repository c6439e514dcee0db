"""Auto-PGD: projected gradient descent with adaptive step sizes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, final

import torch

from robustkit._engine.field_checks import positive
from robustkit.attacks._restarted_attack import Point, RestartedAttack, Trajectory, per_example
from robustkit.errors import ArgumentError
from robustkit.problem import Problem
from robustkit.threats import L2, Linf, Threat

__all__ = ["APGD"]


@final
@dataclass(frozen=True)
class APGD(RestartedAttack):
    """PGD with momentum; the step size starts at twice the budget and is halved where progress stops, from the best point.

    `L1APGD` is the form for L1.

    Attributes:
        steps: Number of steps of a run. Each step, and the start, costs one forward and one backward pass.
        loss: The loss to minimise instead of the goal's own: "cross-entropy", "margin", "dlr", or "targeted-dlr" for runs
            towards one part of the goal after another. A goal that has only one loss keeps it, which is noted.
        restarts: Number of runs along each loss.
        targets: Number of parts of the goal, likeliest at the clean input first, that "targeted-dlr" tries.
        rho: The share of the steps since the last checkpoint that must lower the loss, in (0, 1].
        momentum: The weight of the new step (alpha of the paper), in (0, 1]; the last step has the rest, so 1 means no
            momentum.

    Source: Croce & Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
        attacks", algorithm 1, the two conditions and the checkpoints of section 3 (https://arxiv.org/abs/2003.01690): 100
        steps, rho 0.75, momentum 0.75. As in the authors' code, the first step has no momentum, and checkpoint w comes after
        w steps.

    Where the paper and the authors' code differ, this is the paper: condition 1 requires a share below rho (code: at most
    rho); the first step counts like the others (code: it is compared with a loss of zero); after a return to the best point,
    losses are compared with the loss there (code: with that of the point before the return); checkpoints are rounded up. The
    start is uniform in the threat set (code: it is stretched to the surface of the ball before the box clamps it). The parts
    of the goal are ordered once, by the output at x. With the code's choices for condition 1, the first step and the return,
    the success rates on the shipped models stay within 0.2 points.
    """

    serves: ClassVar[tuple[type[Threat], ...]] = (Linf, L2)

    rho: float = 0.75
    momentum: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(rho=self.rho, momentum=self.momentum)
        for name, value in (("rho", self.rho), ("momentum", self.momentum)):
            if value > 1:
                raise ArgumentError(f"{name}={value!r} must be at most 1: it is a share")

    def check(self, threat: Threat) -> None:
        """Refuse threats other than Linf and L2.

        Raises:
            ArgumentError: The threat is not supported; the message names the attack for L1.
        """
        try:
            super().check(threat)
        except ArgumentError as error:
            raise ArgumentError(f"{error}; for L1 there is L1APGD") from None

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """The steps after which the step size is reviewed: at 22 %, then at gaps 3 % shorter each time, but at least 6 %."""
        checkpoints, percent, gap = [], 0, 22
        while percent + gap <= 100:
            percent, gap = percent + gap, max(gap - 3, 6)
            checkpoints.append(-(-percent * self.steps // 100))
        return tuple(dict.fromkeys(checkpoints))

    def descend(self, problem: Problem, draw: int) -> Point:
        """Algorithm 1."""
        x, threat = problem.x, problem.threat
        windows = {end: end - begin for begin, end in pairwise((0, *self.checkpoints))}
        trajectory, step_size = Trajectory(problem, problem.start(draw)), per_example(2 * threat.budget, x)
        x_previous, lowest = trajectory.current.x_adv, trajectory.current.loss  # lowest at the last checkpoint
        halved, decreases = torch.zeros_like(problem.unsolved), torch.zeros_like(step_size)
        for step in problem.steps(self.steps):
            current, alpha = trajectory.current, self.momentum if step else 1.0
            z = threat.project(threat.move(-current.grad, current.x_adv, x, step_size), x)
            move = alpha * (z - current.x_adv) + (1 - alpha) * (current.x_adv - x_previous)
            x_previous = current.x_adv
            trajectory.move_to(threat.project(current.x_adv + move, x))
            decreases += trajectory.current.loss < current.loss
            if step + 1 in windows:
                # Condition 1: too few steps lowered the loss. Condition 2: no new best loss, though the step size was kept.
                too_few = decreases < self.rho * windows[step + 1]
                halved = too_few | (~halved & (trajectory.best.loss == lowest))
                step_size = torch.where(halved, step_size / 2, step_size)
                trajectory.return_to_best(halved)
                lowest, decreases = trajectory.best.loss, torch.zeros_like(decreases)
        return trajectory.best
