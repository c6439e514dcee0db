"""Wrap a torch model as an ART classifier, and an ART classifier as a `Target`."""

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

# Any in this file: ART is optional, so a type checker may not find its types.


def classifier_of(model: nn.Module, x: Tensor, classes: int, bounds: tuple[float, float] | None) -> Any:
    """Wrap `model` as a `PyTorchClassifier` for inputs of the shape and on the device of `x` (N, *S)."""
    # The sum, not the mean: ART adds 1e-7 to the norm of a gradient, and the mean would shrink gradients by the batch size.
    return load_art()[1].PyTorchClassifier(
        model,
        loss=nn.CrossEntropyLoss(reduction="sum"),
        input_shape=tuple(x.shape[1:]),
        nb_classes=classes,
        clip_values=bounds,
        device_type="gpu" if x.is_cuda else "cpu",
    )


def is_torch(estimator: Any) -> bool:
    """Return whether torch can differentiate this ART classifier."""
    return isinstance(estimator, load_art()[1].PyTorchClassifier)


def bounds_of(estimator: Any, default: tuple[float, float] | None) -> tuple[float, float] | None:
    """Return the lowest and highest valid input of an ART classifier; `default` if it has no `clip_values`.

    Raises:
        ArgumentError: The bounds differ between features.
    """
    if estimator.clip_values is None:
        return default
    low, high = (sorted(set(torch.as_tensor(value).flatten().tolist())) for value in estimator.clip_values)
    if len(low) != 1 or len(high) != 1:
        raise ArgumentError(
            f"clip_values of the estimator run from {low} to {high}: they must be one lowest and one highest value for all "
            "features; rescale the inputs and put the rescaling inside the model"
        )
    return low[0], high[0]


def target_of(estimator: Any, batch_size: int) -> Target:
    """Wrap an ART classifier, with its preprocessing and postprocessing, as a `Target`.

    Success is judged on what the classifier predicts. Gradients go through its preprocessing where torch can differentiate.
    """
    if not is_torch(estimator):
        return Target(Predictions(estimator), batch_size=batch_size)
    module, logits = module_of(estimator._model, *estimator.preprocessing_operations), PreprocessedLogits(estimator)
    # Smoothing and output filters run in numpy; ART's own attacks do not differentiate them either.
    if type(estimator).predict is not load_art()[1].PyTorchClassifier.predict:
        return Target(Predictions(estimator), module, {"model": logits}, batch_size=batch_size)
    if any(step.apply_predict for step in estimator.postprocessing_defences or []):
        return Target(PostprocessedLogits(logits), module, {"model": logits}, batch_size=batch_size)
    return Target(logits, module, batch_size=batch_size)


@final
@dataclass(frozen=True)
class Predictions:
    """The output of `predict` of any ART classifier; not differentiable."""

    estimator: Any

    def __call__(self, x: Tensor) -> Tensor:
        """(N, *S) -> (N, C)."""
        scores = self.estimator.predict(_to_estimator_layout(self.estimator, x).cpu().numpy(), batch_size=len(x))
        return torch.as_tensor(scores, dtype=x.dtype, device=x.device)


@final
@dataclass(frozen=True)
class PreprocessedLogits:
    """The logits of a `PyTorchClassifier` after its preprocessing: exact values, and the gradient that ART documents.

    That is the gradient of `estimate_forward` for torch preprocessors (ART itself uses it only in its numpy path), and
    `estimate_gradient` for numpy preprocessors.
    """

    estimator: Any

    def __call__(self, x: Tensor) -> Tensor:
        """(N, *S) -> (N, C)."""
        estimator, z = self.estimator, _to_estimator_layout(self.estimator, x).to(self.estimator.device)
        if not estimator.all_framework_preprocessing:
            z = _NumpyPreprocessing.apply(z, estimator)  # type: ignore[no-untyped-call]
        else:
            for step in estimator.preprocessing_operations:
                z = _preprocess(step, z) if step.apply_predict else z
        out: Tensor = estimator._model(z)[-1]
        return out.to(x)


@final
@dataclass(frozen=True)
class PostprocessedLogits:
    """The outputs of a `PyTorchClassifier` after its postprocessing; not differentiable.

    `predict` is not called: it would draw random numbers.
    """

    logits: PreprocessedLogits

    def __call__(self, x: Tensor) -> Tensor:
        """(N, *S) -> (N, C)."""
        scores = self.logits(x).detach().cpu().numpy()
        return torch.as_tensor(self.logits.estimator._apply_postprocessing(preds=scores, fit=False)).to(x)


def _preprocess(step: Any, x: Tensor) -> Tensor:
    """Apply one torch preprocessor; the gradient is that of its `estimate_forward` if it overrides that method."""
    base = import_module("art.defences.preprocessor.preprocessor").PreprocessorPyTorch

    def forward(x: Tensor) -> Any:
        return step.forward(x, None)[0]

    overrides = type(step).estimate_forward is not base.estimate_forward
    z: Tensor = (bpda(forward, step.estimate_forward) if overrides else forward)(x)
    return z


@final
class _NumpyPreprocessing(torch.autograd.Function):
    """The output of numpy preprocessors, with the gradient that they estimate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, estimator: Any) -> Tensor:
        ctx.x, ctx.estimator = x.detach().cpu().numpy(), estimator
        return torch.as_tensor(estimator._apply_preprocessing(ctx.x, y=None, fit=False)[0]).to(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        with torch.enable_grad():  # a torch preprocessor in the same list needs autograd
            estimated = ctx.estimator._apply_preprocessing_gradient(ctx.x, grads[0].detach().cpu().numpy())
        return torch.as_tensor(estimated).to(grads[0]), None


def _to_estimator_layout(estimator: Any, x: Tensor) -> Tensor:
    """Convert images (N, C, H, W) to the estimator's layout; other inputs are returned as they are."""
    return x.movedim(1, -1) if channels_last(estimator) and x.dim() == 4 else x


def channels_last(estimator: Any) -> bool:
    """Return whether this estimator takes images (N, H, W, C)."""
    return not getattr(estimator, "channels_first", True)
