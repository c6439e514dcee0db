"""A torch model as a classifier of ART, and a classifier of ART as a target of ours."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, final

import torch
from torch import Tensor, nn

from robustkit._engine.introspection import module_of
from robustkit.adaptive import bpda
from robustkit.errors import ArgumentError
from robustkit.interop.peers import load_art
from robustkit.target import Target

__all__ = ["bounds_of", "channels_last", "classifier_of", "is_torch", "target_of"]

# Any in this file: what belongs to ART, which is optional, so a type checker may not find it.


def classifier_of(model: nn.Module, x: Tensor, classes: int, bounds: tuple[float, float] | None) -> Any:
    """`model` as a `PyTorchClassifier` for inputs like `x` (N, *S), on the device of these."""
    # The sum, not the mean: ART adds 1e-7 to the length of a gradient, which must not be made small by the batch.
    return load_art()[1].PyTorchClassifier(
        model,
        loss=nn.CrossEntropyLoss(reduction="sum"),
        input_shape=tuple(x.shape[1:]),
        nb_classes=classes,
        clip_values=bounds,
        device_type="gpu" if x.is_cuda else "cpu",
    )


def is_torch(estimator: Any) -> bool:
    """Whether torch can differentiate this classifier of ART."""
    return isinstance(estimator, load_art()[1].PyTorchClassifier)


def bounds_of(estimator: Any, default: tuple[float, float] | None) -> tuple[float, float] | None:
    """Lowest and highest valid input of a classifier; `default` where it names none.

    Raises:
        ArgumentError: The bounds differ from value to value.
    """
    if estimator.clip_values is None:
        return default
    low, high = (sorted(set(torch.as_tensor(value).flatten().tolist())) for value in estimator.clip_values)
    if len(low) != 1 or len(high) != 1:
        raise ArgumentError(
            f"clip_values of the estimator run from {low} to {high}: they must be one lowest and one highest value for all "
            "features; scale the inputs, with the scaling inside the model"
        )
    return low[0], high[0]


def target_of(estimator: Any, batch_size: int) -> Target:
    """A classifier of ART with everything before and after its model: judged on what it predicts, held, differentiable."""
    if not is_torch(estimator):
        return Target(Predicted(estimator), batch_size=batch_size)
    held, answer = module_of(estimator._model, *estimator.preprocessing_operations), Answer(estimator)
    # Smoothed predictions and filters of the output are numpy; ART's own attacks do not look through them either.
    if type(estimator).predict is not load_art()[1].PyTorchClassifier.predict:
        return Target(Predicted(estimator), held, {"model": answer}, batch_size=batch_size)
    if any(step.apply_predict for step in estimator.postprocessing_defences or []):
        return Target(Filtered(answer), held, {"model": answer}, batch_size=batch_size)
    return Target(answer, held, batch_size=batch_size)


@final
@dataclass(frozen=True)
class Predicted:
    """What any classifier predicts, without a derivative."""

    estimator: Any

    def __call__(self, x: Tensor) -> Tensor:
        """(N, *S) -> (N, C)."""
        scores = self.estimator.predict(_outward(self.estimator, x).cpu().numpy(), batch_size=len(x))
        return torch.as_tensor(scores, dtype=x.dtype, device=x.device)


@final
@dataclass(frozen=True)
class Answer:
    """The outputs of a `PyTorchClassifier`, its preprocessing included: exact values, and the derivative that ART promises.

    ART's torch preprocessors promise `estimate_forward`, which ART itself follows in its numpy path alone; numpy ones
    promise `estimate_gradient`.
    """

    estimator: Any

    def __call__(self, x: Tensor) -> Tensor:
        """(N, *S) -> (N, C)."""
        estimator, z = self.estimator, _outward(self.estimator, x).to(self.estimator.device)
        if not estimator.all_framework_preprocessing:
            z = _Preprocessed.apply(z, estimator)  # type: ignore[no-untyped-call]
        else:
            for step in estimator.preprocessing_operations:
                z = _prepared(step, z) if step.apply_predict else z
        out: Tensor = estimator._model(z)[-1]
        return out.to(x)


@final
@dataclass(frozen=True)
class Filtered:
    """The outputs of a `PyTorchClassifier` after its postprocessing; `predict` itself would draw random numbers."""

    answer: Answer

    def __call__(self, x: Tensor) -> Tensor:
        """(N, *S) -> (N, C)."""
        scores = self.answer(x).detach().cpu().numpy()
        return torch.as_tensor(self.answer.estimator._apply_postprocessing(preds=scores, fit=False)).to(x)


def _prepared(step: Any, x: Tensor) -> Tensor:
    """One torch preprocessor; with the derivative of its `estimate_forward` where it has one of its own."""
    base = import_module("art.defences.preprocessor.preprocessor").PreprocessorPyTorch

    def forward(x: Tensor) -> Any:
        return step.forward(x, None)[0]

    own = type(step).estimate_forward is not base.estimate_forward
    z: Tensor = (bpda(forward, step.estimate_forward) if own else forward)(x)
    return z


@final
class _Preprocessed(torch.autograd.Function):
    """What numpy preprocessors make of an input, and the derivative that they estimate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, estimator: Any) -> Tensor:
        ctx.x, ctx.estimator = x.detach().cpu().numpy(), estimator
        return torch.as_tensor(estimator._apply_preprocessing(ctx.x, y=None, fit=False)[0]).to(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        with torch.enable_grad():  # a torch preprocessor beside a numpy one is asked for its own
            estimated = ctx.estimator._apply_preprocessing_gradient(ctx.x, grads[0].detach().cpu().numpy())
        return torch.as_tensor(estimated).to(grads[0]), None


def _outward(estimator: Any, x: Tensor) -> Tensor:
    """Images as the estimator wants them; inside this package channels come first."""
    return x.movedim(1, -1) if channels_last(estimator) and x.dim() == 4 else x


def channels_last(estimator: Any) -> bool:
    """Whether images are (N, H, W, C) for this estimator."""
    return not getattr(estimator, "channels_first", True)
