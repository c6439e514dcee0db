"""A model on its data: its predictions before any attack, and its errors, each in one line."""

from __future__ import annotations

import hashlib
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustkit._engine.noise import Noise
from robustkit._engine.output_checks import predict_one
from robustkit._engine.state_guard import fork_generators, fork_rng, is_out_of_memory
from robustkit.bench.plan.defence_specs import guard_target
from robustkit.bench.plan.model_specs import load_model, model_hash
from robustkit.bench.plan.plan import Case, Plan
from robustkit.data import Data
from robustkit.defence import guards_of
from robustkit.errors import ArgumentError, RobustkitError
from robustkit.goals import Misclassify
from robustkit.target import Fn, Target
from robustkit.threats import Pixels, Threat

__all__ = ["ModelUnderTest", "load_model_under_test", "load_models_under_test"]


@final
class _ErrorTranslator(nn.Module):
    """Raises the exceptions of a model as ArgumentError, which tells them apart from defects of this package."""

    def __init__(self, spec: str, model: nn.Module) -> None:
        super().__init__()
        self.spec, self.model = spec, model
        self.train(model.training)

    def forward(self, x: Tensor) -> Any:  # Any: only the goal knows whether these are logits
        """The outputs of the model."""
        try:
            return self.model(x)
        except (Exception, SystemExit) as error:
            if isinstance(error, RobustkitError) or is_out_of_memory(error):
                raise
            message = _error_message(self.spec, "raised", x, error)
            raise ArgumentError(message + "; it must accept the images of the data") from error


def load_model_under_test(spec: str, data: Data, plan: Plan) -> ModelUnderTest:
    """Load the model that `spec` names, without a defence, and run it on `data`."""
    model = load_model(spec, plan.device, plan.normalize)
    return ModelUnderTest(
        spec,
        Target(_ErrorTranslator(spec, model), model, batch_size=plan.batch_size, stochastic=_declares_randomness(model)),
        data,
        plan,
        weights=model,
    )


def _declares_randomness(model: nn.Module) -> bool | None:
    """True if the model, or a module in it, has an attribute `stochastic` that is True; else None."""
    return True if any(getattr(part, "stochastic", None) is True for part in model.modules()) else None


def load_models_under_test(data: Data, plan: Plan) -> dict[str, ModelUnderTest]:
    """Everything that the cases of a plan attack, by `Case.model_under_test`: models alone, and behind each of their defences.

    Each model is loaded once.
    """
    undefended = {spec: load_model_under_test(spec, data, plan) for spec in plan.models}
    models: dict[str, ModelUnderTest] = {}
    for case in plan.cases:
        if case.model_under_test not in models:
            model = undefended[case.model]
            models[case.model_under_test] = model if case.defence_or_none is None else model.behind_defence(case)
    return models


@final
class ModelUnderTest:
    """A model, perhaps behind a defence, on its data.

    Attributes:
        spec: The spec of the model, and of its defence.
        target: The model as a target.
        hash: Hash of the weights; of nothing for a function without weights.
        signature: The entry of [hashes] in a plan: `hash`, and the rounded mean and standard deviation of the logits of the
            first block, since weights alone do not determine a function.
        fingerprint: Hash of the weights and, on the CPU, of all bits of the logits of the first block.
        data: The images.
        classes: The number of classes of the model.
    """

    def __init__(self, spec: str, target: Target, data: Data, plan: Plan, *, weights: nn.Module | None) -> None:
        self.spec, self.target, self.data, self._plan = spec, target, data, plan
        self._correct: dict[tuple[int, int], NDArray[np.bool_]] = {}
        rows = slice(0, min(plan.block, len(data)))
        logits = self.logits(data.images(rows), data.y[rows], 0, "clean")
        self.classes = logits.shape[1]
        self._correct[0, rows.stop] = (~Misclassify().success(logits, data.y[rows])).numpy()
        # Check all labels, not only those of the first block: otherwise the run might fail hours later.
        self._check_logits(logits[:1].expand(2, -1), torch.stack([data.y.min(), data.y.max()]))
        self._weights = weights if weights is not None else nn.Module()
        self.hash = model_hash(self._weights)
        self.signature = f"{self.hash} {logits.double().mean():.5g} {logits.double().std(correction=0):.5g}"
        # On other devices the order of summation, and with it the last bits, may change from run to run.
        output_bytes = logits.double().numpy().tobytes() if plan.device == "cpu" else b""
        self.fingerprint = hashlib.sha256(self.hash.encode() + output_bytes).hexdigest()[:16]

    def behind_defence(self, case: Case) -> ModelUnderTest:
        """The same model behind the defence of a case; the hash covers the weights of both."""
        target = guard_target(case.defence, self.target, self._plan.device)
        guards = [guard for guard in guards_of(target) if guard.state_dict()]
        weights = nn.ModuleList([self._weights, *guards]) if guards else self._weights
        return ModelUnderTest(case.model_under_test, target, self.data, self._plan, weights=weights)

    def correct(self, rows: slice) -> NDArray[np.bool_]:
        """Which images of a block are classified correctly without an attack, (n,); computed once for all cases."""
        key = rows.start, rows.stop
        if key not in self._correct:
            labels = self.data.y[rows]
            logits = self.logits(self.data.images(rows), labels, rows.start, "clean")
            self._correct[key] = (~Misclassify().success(logits, labels)).numpy()
        return self._correct[key]

    @torch.no_grad()
    def logits(self, x: Tensor, y: Tensor, first: int, purpose: str) -> Tensor:
        """The logits of images, computed in evaluation mode and in batches.

        Args:
            x: The images, (N, C, H, W).
            y: Their labels, (N,).
            first: The index in the data of the first image.
            purpose: Keys the noise of a random model, so that each purpose has its own draws.

        Returns:
            Shape (N, classes), on the CPU.

        Raises:
            ArgumentError: The model fails, runs out of memory, or returns something else than logits.
        """
        noise, size = Noise(self._plan.seed, torch.arange(0)).at(purpose, self._plan.offset + first), self.target.batch_size
        fn, device = self.target.fn, self._plan.device
        try:
            with self.target.frozen(), fork_rng(noise.key), fork_generators(self.target.generators, noise.key):
                batches = [slice(start, start + size) for start in range(0, len(x), size)]
                # A copy, because a model may write to its input.
                return torch.cat([self._check_logits(_call(fn, x[part].to(device, copy=True)), y[part]) for part in batches])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise ArgumentError(f"batch_size={size}: model {self.spec!r} ran out of memory; take a smaller one") from error

    def check(self, case: Case, threat: Threat, target_class: int | None, white_box: bool) -> None:
        """Check that a case can be run on this model and data.

        Args:
            case: The case, for messages.
            threat: Its threat.
            target_class: The class that its goal names, or None.
            white_box: Whether its attack uses gradients.

        Raises:
            ArgumentError: The model does not have the class, the threat changes all locations of an image, or a gradient
                raises.
        """
        if target_class is not None and target_class >= self.classes:
            raise ArgumentError(f"goal {case.goal!r}: model {self.spec!r} has the classes 0 to {self.classes - 1}; name one")
        locations = self.data.shape[2:].numel()
        if isinstance(threat, Pixels) and threat.eps >= locations:
            raise ArgumentError(
                f"threat {case.threat!r}: an image of {self.data.spec} has {locations} locations, and at least one must stay "
                "unchanged; take fewer"
            )
        if white_box:
            self._check_gradient()

    def _check_logits(self, out: Any, y: Tensor) -> Tensor:
        """`out` on the CPU, after a check that it contains logits for the labels."""
        where = f"model {self.spec!r} on data {self.data.spec!r}"
        if isinstance(out, Tensor) and out.shape[:1] != y.shape:
            raise ArgumentError(
                f"{where}: {len(y)} images gave outputs of shape {tuple(out.shape)}; the model must return logits (N, classes)"
            )
        try:
            Misclassify().check(out.cpu() if isinstance(out, Tensor) else out, y)
        except RobustkitError as error:
            raise ArgumentError(f"{where}: {error}") from error
        logits: Tensor = out.cpu()
        return logits

    def _check_gradient(self) -> None:
        """Compute a gradient along each view. A missing gradient is accepted (attacks flag it); one that raises is not."""
        # Two images need little memory, and some layers fail on a single one.
        x = self.data.images(slice(0, min(self.target.batch_size, 2))).to(self._plan.device).requires_grad_()
        with self.target.frozen(), fork_rng(self._plan.seed):
            for name, view in self.target.views.items():
                out = _call(view, x.clone()).sum()
                try:
                    if out.requires_grad:
                        torch.autograd.grad(out, x, allow_unused=True)
                except Exception as error:
                    along = "" if len(self.target.views) == 1 else f" along view {name!r}"
                    message = _error_message(self.spec, f"has a gradient{along} that raised", x, error)
                    raise ArgumentError(message + "; its operations must be differentiable") from error


def _call(fn: Fn, x: Tensor) -> Any:
    """The outputs for a batch. A single image also works if the model fails on batches of one; attacks add a note on that."""
    return predict_one(fn, x)[0] if len(x) == 1 else fn(x)


def _error_message(spec: str, what: str, x: Tensor, error: BaseException) -> str:
    reason = " ".join(str(error).split())[:300]
    return f"model {spec!r} {what} {type(error).__name__} on images {tuple(x.shape)}: {reason}"
