"""Wrap our attacks and defences in classes of ART, which are created only where ART is installed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from types import MappingProxyType
from typing import Any, ClassVar, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from robustkit._engine.best_so_far import check_keep
from robustkit._engine.field_checks import at_least
from robustkit._engine.state_guard import fork_rng, frozen
from robustkit.attack import Attack
from robustkit.defence import Defence
from robustkit.errors import ArgumentError, ShapeError
from robustkit.goals import ClassifyAs, Goal, Misclassify
from robustkit.interop._art_estimator import bounds_of, channels_last, is_torch, target_of
from robustkit.target import Target
from robustkit.threats import L1, L2, Linf, Threat

__all__ = ["NORMS", "attack_class", "preprocessor_class"]

# Any in this file: ART is optional, so a type checker may not find its types.

NORMS: Mapping[type[Threat], float] = MappingProxyType({Linf: np.inf, L2: 2, L1: 1})  # the threats that ART supports
_PARAMETERS = ("attack", "threat", "goal", "eps", "targeted", "seed", "keep", "batch_size", "verbose")  # for `set_params`


def attack_class(access: str) -> Any:
    """Return an ART attack class that requires gradients of the classifier (access "white") or only its outputs."""
    base, estimators = import_module("art.attacks.attack"), import_module("art.estimators.estimator")
    mixin = import_module("art.estimators.classification.classifier").ClassifierMixin
    gradients = (estimators.LossGradientsMixin,) if access == "white" else ()

    class RobustkitAttack(base.EvasionAttack):  # type: ignore[misc, name-defined]
        attack_params: ClassVar[list[str]] = [*base.EvasionAttack.attack_params, *_PARAMETERS]
        _estimator_requirements = (estimators.BaseEstimator, *gradients, mixin)

        def __init__(self, attack: Attack, estimator: Any, threat: Threat, goal: Goal) -> None:
            super().__init__(estimator=estimator)
            self.attack, self.threat = attack, threat
            self.goal: Any = goal
            self.seed, self.keep, self.batch_size, self.verbose = 0, "first", 128, False

        @property
        def eps(self) -> Any:
            return self.threat.eps

        @eps.setter
        def eps(self, eps: Any) -> None:
            self.threat = replace(self.threat, eps=torch.as_tensor(eps) if isinstance(eps, np.ndarray) else eps)

        @property
        def norm(self) -> float | None:
            """The norm of the threat, None if ART does not support it; ART reads it where norms must not be mixed."""
            return NORMS.get(type(self.threat))

        @property
        def targeted(self) -> bool:
            return isinstance(self.goal, ClassifyAs)

        @targeted.setter
        def targeted(self, targeted: bool) -> None:
            if not isinstance(targeted, bool):
                raise ArgumentError(f"targeted={targeted!r} must be True or False")
            self.goal = (ClassifyAs if targeted else Misclassify)(self.goal.surrogate)

        def set_params(self, **kwargs: Any) -> None:
            """Set all parameters; if one is refused, none is changed."""
            before = dict(vars(self))
            try:
                super().set_params(**kwargs)
            except Exception:
                self.__dict__.clear()
                self.__dict__.update(before)
                raise

        def _check_params(self) -> None:
            _check_parameters(self)

        def generate(self, x: Any, y: Any = None, mask: Any = None) -> Any:
            if mask is not None and not np.all(mask):
                raise ArgumentError("mask has zeros: masked inputs are not supported; leave out the mask")
            return _generate(self, x, y)

    return RobustkitAttack


def _check_parameters(adapter: Any) -> None:
    """Raise ArgumentError for parameters that cannot be run; ART calls this whenever a parameter is set."""
    if not isinstance(adapter.attack, Attack) or not isinstance(adapter.threat, Threat):
        raise ArgumentError(
            f"attack={adapter.attack!r} and threat={adapter.threat!r} must be robustkit objects, such as PGD() and "
            "Linf(8 / 255)"
        )
    if not isinstance(adapter.goal, Misclassify | ClassifyAs):
        raise ArgumentError(
            f"goal={adapter.goal!r} must be Misclassify(...) or ClassifyAs(...): ART's classifiers support no other"
        )
    check_keep(adapter.keep)
    for name, kind, rule in (("seed", SupportsIndex, "a whole number"), ("verbose", bool, "True or False")):
        if not isinstance(getattr(adapter, name), kind):
            raise ArgumentError(f"{name}={getattr(adapter, name)!r} must be {rule}")
    at_least(1, batch_size=adapter.batch_size)
    if adapter.attack.access == "white" and not is_torch(adapter.estimator):
        raise ArgumentError(
            f"attack={adapter.attack!r} needs gradients in torch, and the estimator is a {type(adapter.estimator).__name__}: "
            "give a PyTorchClassifier, or an attack that needs only outputs"
        )
    adapter.threat = replace(adapter.threat, bounds=bounds_of(adapter.estimator, adapter.threat.bounds))
    adapter.attack.check(adapter.threat)


def _generate(adapter: Any, x: Any, y: Any) -> Any:
    """Return the adversarial images, float32 in the shape of x."""
    if y is None and adapter.targeted:
        raise ArgumentError("y=None: a targeted attack needs target classes; give them as y")
    images = torch.from_numpy(np.array(x, dtype=np.float32)).to(getattr(adapter.estimator, "device", "cpu"))
    last = channels_last(adapter.estimator) and images.dim() == 4
    images, target = images.movedim(-1, 1) if last else images, target_of(adapter.estimator, adapter.batch_size)
    ref = _predict_classes(target, images) if y is None else _class_indices(y, len(images)).to(images.device)
    result = adapter.attack(target, images, ref, goal=adapter.goal, threat=adapter.threat, seed=adapter.seed, keep=adapter.keep)
    return np.ascontiguousarray((result.x_adv.movedim(1, -1) if last else result.x_adv).cpu().numpy())


def _predict_classes(target: Target, x: Tensor) -> Tensor:
    """Return the classes that the target predicts, (N,) int64."""
    size = target.batch_size
    with torch.no_grad(), target.frozen(), fork_rng(0):
        classes = [target.fn(x[i : i + size]).argmax(1) for i in range(0, len(x), size)]
    return torch.cat([torch.zeros(0, dtype=torch.int64, device=x.device), *classes])


def _class_indices(y: Any, n: int) -> Tensor:
    """Convert labels in any form that ART allows, indices (N,) or (N, 1), one-hot or scores (N, C), to (N,) int64."""
    y = np.asarray(y)
    if y.shape[:1] != (n,) or y.ndim > 2:
        raise ShapeError(f"y has shape {y.shape} for {n} inputs; it must hold a class (N,) or scores (N, C) for each")
    return torch.from_numpy(y.argmax(1) if y.ndim == 2 and y.shape[1] > 1 else y.reshape(n).astype(np.int64))


def preprocessor_class() -> Any:
    """Return an ART preprocessor class that applies a `Defence`."""
    base = import_module("art.defences.preprocessor.preprocessor").PreprocessorPyTorch

    class RobustkitPreprocessor(base):  # type: ignore[misc, valid-type]
        params: ClassVar[list[str]] = ["defence"]

        def __init__(self, defence: Defence, apply_fit: bool) -> None:
            super().__init__(device_type="cpu", is_fitted=True, apply_fit=apply_fit, apply_predict=True)
            self.defence = defence
            self._check_params()

        @property
        def device(self) -> torch.device:
            """The device of the defence; ART moves arrays there in its numpy path."""
            parts = [*self.defence.parameters(), *self.defence.buffers()]
            return parts[0].device if parts else torch.device("cpu")

        def forward(self, x: Tensor, y: Any = None) -> tuple[Tensor, Any]:
            # ART differentiates `forward` on this path and never calls `estimate_forward`, so the view must be applied here.
            with frozen(self.defence, "eval"):
                return (self._view if torch.is_grad_enabled() and x.requires_grad else self.defence)(x), y

        def estimate_forward(self, x: Tensor, y: Any = None) -> Tensor:
            with frozen(self.defence, "eval"):
                out: Tensor = self._view(x)
                return out

        def _check_params(self) -> None:
            if not isinstance(self.defence, Defence):
                raise ArgumentError(f"defence={self.defence!r} must be a Defence, such as robustkit.defences.Quantise(8)")
            self._view = next(iter(self.defence.checked_views().values()))

    return RobustkitPreprocessor
