"""A model on some data: what it says before any attack, and in one line what is wrong with it."""

from __future__ import annotations

import hashlib
import math
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustkit._engine.noise import Noise
from robustkit._engine.output_checks import predict_one
from robustkit._engine.state_guard import fork_generators, fork_rng, is_out_of_memory
from robustkit.bench.plan.defence_specs import guarded
from robustkit.bench.plan.model_specs import load_model, model_hash
from robustkit.bench.plan.plan import Case, Plan
from robustkit.data import Data
from robustkit.defence import guards_of
from robustkit.errors import ArgumentError, RobustkitError
from robustkit.goals import Misclassify
from robustkit.target import Fn, Target
from robustkit.threats import Pixels

__all__ = ["Subject", "hash_matches", "load_subject", "load_subjects"]


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
        except (Exception, SystemExit) as error:
            if isinstance(error, RobustkitError) or is_out_of_memory(error):
                raise
            raise ArgumentError(_failed(self.spec, "raised", x, error) + "; it must take what the data holds") from error


def load_subject(spec: str, data: Data, plan: Plan) -> Subject:
    """The model that `spec` names on `data`."""
    model = load_model(spec, plan.device, plan.normalize)
    return Subject(
        spec,
        Target(_Told(spec, model), model, batch_size=plan.batch_size, stochastic=_declared(model)),
        data,
        plan,
        weights=model,
    )


def _declared(model: nn.Module) -> bool | None:
    """True where the model, or one inside, says by an attribute `stochastic` that it is random on purpose; else None."""
    return True if any(getattr(part, "stochastic", None) is True for part in model.modules()) else None


def load_subjects(data: Data, plan: Plan) -> dict[str, Subject]:
    """What the cases of a plan attack: each model once, as it is or behind each of its defences, by the words for it."""
    plain = {spec: load_subject(spec, data, plan) for spec in plan.models}
    found: dict[str, Subject] = {}
    for case in plan.cases:
        if case.subject not in found:
            found[case.subject] = plain[case.model] if case.defended is None else plain[case.model].behind(case)
    return found


@final
class Subject:
    """A model on some data.

    Attributes:
        spec: What was asked for.
        target: The model.
        hash: Of its weights; of nothing for a bare function.
        pin: The hash, and the mean and standard deviation of what it says of the first images, rounded: weights alone do not
            make a function.
        fingerprint: A hash of what it says of the first images to the last bit, where that is the same each time.
        data: The images.
        classes: How many the model knows.
    """

    def __init__(self, spec: str, target: Target, data: Data, plan: Plan, *, weights: nn.Module | None) -> None:
        self.spec, self.target, self.data, self._plan = spec, target, data, plan
        self._clean: dict[tuple[int, int], NDArray[np.bool_]] = {}
        rows = slice(0, min(plan.block, len(data)))
        logits = self.logits(data.images(rows), data.y[rows], 0, "clean")
        self.classes = logits.shape[1]
        self._clean[0, rows.stop] = (~Misclassify().success(logits, data.y[rows])).numpy()
        # All labels, though only the first images were shown: a run is not to stop hours later.
        self._checked(logits[:1].expand(2, -1), torch.stack([data.y.min(), data.y.max()]))
        self._weights = weights if weights is not None else nn.Module()
        self.hash = model_hash(self._weights)
        self.pin = f"{self.hash} {logits.double().mean():.5g} {logits.double().std(correction=0):.5g}"
        # Elsewhere sums are formed in an order that changes from run to run.
        said = logits.double().numpy().tobytes() if plan.device == "cpu" else b""
        self.fingerprint = hashlib.sha256(self.hash.encode() + said).hexdigest()[:16]

    def behind(self, case: Case) -> Subject:
        """The same model behind the defence of a case; the hash is that of both."""
        target = guarded(case.defence, self.target, self._plan.device)
        guards = [guard for guard in guards_of(target) if guard.state_dict()]
        weights = nn.ModuleList([self._weights, *guards]) if guards else self._weights
        return Subject(case.subject, target, self.data, self._plan, weights=weights)

    def clean(self, rows: slice) -> NDArray[np.bool_]:
        """Which images of a block it classifies correctly without an attack; asked once, whatever the number of cases."""
        key = rows.start, rows.stop
        if key not in self._clean:
            labels = self.data.y[rows]
            logits = self.logits(self.data.images(rows), labels, rows.start, "clean")
            self._clean[key] = (~Misclassify().success(logits, labels)).numpy()
        return self._clean[key]

    @torch.no_grad()
    def logits(self, x: Tensor, y: Tensor, first: int, purpose: str) -> Tensor:
        """What the model says of images (N, C, H, W) with labels (N,), the first of them being `first` of the data.

        Noise of the model's own is drawn anew for each `purpose`.

        Returns:
            Shape (N, classes), on the CPU.
        """
        noise, size = Noise(self._plan.seed, torch.arange(0)).at(purpose, self._plan.offset + first), self.target.batch_size
        fn, device = self.target.fn, self._plan.device
        try:
            with self.target.frozen(), fork_rng(noise.key), fork_generators(self.target.generators, noise.key):
                batches = [slice(start, start + size) for start in range(0, len(x), size)]
                # A copy goes in: a model may write to its input.
                return torch.cat([self._checked(_asked(fn, x[part].to(device, copy=True)), y[part]) for part in batches])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise ArgumentError(f"batch_size={size}: memory ran out in model {self.spec!r}; take a smaller one") from error

    def check(self, case: Case, threat: Any, wanted: int | None, white: bool) -> None:
        """Refuse what cannot be done to this model on this data.

        Raises:
            ArgumentError: A class that the model does not know, more locations than an image has, a broken gradient.
        """
        if wanted is not None and wanted >= self.classes:
            raise ArgumentError(f"goal {case.goal!r}: model {self.spec!r} has the classes 0 to {self.classes - 1}; name one")
        locations = self.data.shape[2:].numel()
        if isinstance(threat, Pixels) and threat.eps >= locations:
            told = f"an image of {self.data.spec} has {locations} locations, and one at least must stay as it is; take fewer"
            raise ArgumentError(f"threat {case.threat!r}: {told}")
        if white:
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
        x = self.data.images(slice(0, min(self.target.batch_size, 2))).to(self._plan.device).requires_grad_()
        with self.target.frozen(), fork_rng(self._plan.seed):
            for name, view in self.target.views.items():
                out = _asked(view, x.clone()).sum()
                try:
                    if out.requires_grad:
                        torch.autograd.grad(out, x, allow_unused=True)
                except Exception as error:
                    along = "" if len(self.target.views) == 1 else f" along view {name!r}"
                    told = _failed(self.spec, f"has a gradient{along} that raised", x, error)
                    raise ArgumentError(told + "; its operations must be differentiable") from error


def _asked(fn: Fn, x: Tensor) -> Any:
    """What is said of some images, of one also where the model cannot do with one; attacks tell of that."""
    return predict_one(fn, x)[0] if len(x) == 1 else fn(x)


def hash_matches(found: str, wanted: str) -> bool:
    """Whether what is found is what was pinned: the same hash, and answers that differ by rounding at most.

    A pin is a hash, or a hash and numbers with spaces between them; a pin without numbers asks for none.
    """
    (hash_found, *answers), (hash_wanted, *others) = found.split(), wanted.split()
    if hash_found != hash_wanted or (others and len(answers) != len(others)):
        return False
    try:
        pairs = [(float(answer), float(other)) for answer, other in zip(answers, others, strict=False)]
    except ValueError:
        return False
    scale = max([abs(other) for _, other in pairs if math.isfinite(other)], default=0.0)
    return all(a == b or abs(a - b) <= 1e-3 * scale or (math.isnan(a) and math.isnan(b)) for a, b in pairs)


def _failed(spec: str, how: str, x: Tensor, error: BaseException) -> str:
    said = " ".join(str(error).split())[:300]
    return f"model {spec!r} {how} {type(error).__name__} on images {tuple(x.shape)}: {said}"
