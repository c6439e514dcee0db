"""An attack as another package would publish it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from robustkit import Linf
from robustkit.attack import Attack
from robustkit.problem import Problem


@final
@dataclass(frozen=True)
class RandomCorner(Attack):
    """Random corners of the box, one after another; the last one comes back.

    Attributes:
        tries: How many.
        signs: Random ones for each value, or one for the whole image.
    """

    tries: int = 5
    signs: Literal["each", "one"] = "each"
    access: ClassVar = "score"
    serves: ClassVar = (Linf,)

    def run(self, problem: Problem) -> Tensor:
        x_adv = problem.x
        for step in problem.steps(self.tries):
            draw = problem.noise("corner", step).normal(*problem.x.shape[1:]).to(problem.x)
            signs = draw if self.signs == "each" else draw.flatten(1)[:, :1].reshape(-1, 1, 1, 1).expand_as(draw)
            x_adv = problem.threat.project(problem.x + problem.threat.budget * torch.sign(signs), problem.x)
            problem.loss(x_adv)
        return x_adv
