"""A model on some data: what it says before any attack, and in one line what is wrong with it."""

from __future__ import annotations

from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustkit._random import Noise
from robustkit._world import held, is_out_of_memory, seeded
from robustkit.bench import specs
from robustkit.bench.models import load_model, model_hash
from robustkit.bench.plan import Case, Plan
from robustkit.data import Data
from robustkit.errors import ArgumentError, RobustkitError
from robustkit.goals import Misclassify
from robustkit.threats import Pixels

__all__ = ["BLOCK", "Subject"]

BLOCK = 100  # images; fixed, so that a run is the same wherever it is cut


@final
class _Told(nn.Module):
    """A model whose own exceptions come out as ArgumentError, so that a defect of ours is not taken for one of it."""

    def __init__(self, spec: str, model: nn.Module) -> None:
        super().__init__()
        self.spec, self.model = spec, model
        self.train(model.training)

    def forward(self, x: Tensor) -> Any:  # Any: only the goal knows whether these are logits
        """What the model says."""
        try:
            return self.model(x)
        except Exception as error:
            if isinstance(error, RobustkitError) or is_out_of_memory(error):
                raise
            raise ArgumentError(_failed(self.spec, "raised", x, error) + "; it must take what the data holds") from error


@final
class Subject:
    """A model on some data.

    Attributes:
        spec: What was asked for.
        model: The model; exceptions of its own come out of it as ArgumentError.
        hash: Of its weights.
        data: The images.
        classes: How many the model knows.
        clean: Which images it classifies correctly without an attack, (N,).
    """

    def __init__(self, spec: str, data: Data, plan: Plan) -> None:
        model = load_model(spec, plan.device)
        self.spec, self.data, self._plan = spec, data, plan
        self.model = _Told(spec, model)
        clean = []
        for first in range(0, len(data), BLOCK):
            rows = slice(first, min(first + BLOCK, len(data)))
            logits = self.logits(data.x[rows], data.y[rows], rows.start, "clean")
            clean.append(~Misclassify().success(logits, data.y[rows]))
        self.classes = logits.shape[1]
        self.clean: NDArray[np.bool_] = torch.cat(clean).numpy()
        self.hash = model_hash(model)

    @torch.no_grad()
    def logits(self, x: Tensor, y: Tensor, first: int, purpose: str) -> Tensor:
        """What the model says of images (N, C, H, W) with labels (N,), the first of them being `first` of the data.

        Noise of the model's own is drawn anew for each `purpose`.

        Returns:
            Shape (N, classes), on the CPU.
        """
        noise, size = Noise(self._plan.seed, torch.arange(0)).at(purpose, self._plan.offset + first), self._plan.batch_size
        try:
            with held(self.model, "eval"), seeded(noise.key):
                batches = [slice(start, start + size) for start in range(0, len(x), size)]
                return torch.cat([self._checked(self.model(x[part].to(self._plan.device)), y[part]) for part in batches])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise ArgumentError(f"batch_size={size}: memory ran out in model {self.spec!r}; take a smaller one") from error

    def check(self, case: Case) -> None:
        """Refuse what cannot be done to this model on this data.

        Raises:
            ArgumentError: A class that the model does not know, more locations than an image has, a broken gradient.
        """
        wanted, threat = specs.goal(case.goal).wanted, specs.threat(case.threat)
        if wanted is not None and wanted >= self.classes:
            raise ArgumentError(f"goal {case.goal!r}: model {self.spec!r} has the classes 0 to {self.classes - 1}; name one")
        locations = self.data.x[0, 0].numel()
        if isinstance(threat, Pixels) and threat.eps > locations:
            raise ArgumentError(f"threat {case.threat!r}: an image of {self.data.spec} has {locations} locations; take fewer")
        if specs.attack(case.attack).access == "white":
            self._check_gradient()

    def _checked(self, out: Any, y: Tensor) -> Tensor:
        """`out` on the CPU, if these are logits for the labels."""
        found = f"model {self.spec!r} on data {self.data.spec!r}"
        if isinstance(out, Tensor) and out.shape[:1] != y.shape:
            raise ArgumentError(
                f"{found}: {len(y)} images came back as shape {tuple(out.shape)}; the model must return logits (N, classes)"
            )
        try:
            Misclassify().check(out.cpu() if isinstance(out, Tensor) else out, y)
        except RobustkitError as error:
            raise ArgumentError(f"{found}: {error}") from error
        logits: Tensor = out.cpu()
        return logits

    def _check_gradient(self) -> None:
        """A model without any gradient can be attacked, in vain; one whose gradient raises cannot."""
        # Two images need little memory, and suffice for layers that cannot do with one.
        x = self.data.x[: min(self._plan.batch_size, 2)].to(self._plan.device).requires_grad_()
        with held(self.model, "eval"), seeded(self._plan.seed):
            out = self.model(x.clone()).sum()
            try:
                if out.requires_grad:
                    torch.autograd.grad(out, x, allow_unused=True)
            except Exception as error:
                told = _failed(self.spec, "has a gradient that raised", x, error)
                raise ArgumentError(told + "; its operations must be differentiable") from error


def _failed(spec: str, how: str, x: Tensor, error: Exception) -> str:
    said = " ".join(str(error).split())[:300]
    return f"model {spec!r} {how} {type(error).__name__} on images {tuple(x.shape)}: {said}"
