"""WHAT IS ATTACKED: a function, the module behind it, and the ways in which an adversary may differentiate it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, final, get_args

from torch import Tensor, nn

from robustkit._engine.introspection import generators_of, module_of
from robustkit._engine.state_guard import Mode, frozen
from robustkit.errors import ArgumentError

__all__ = ["Fn", "Target"]

Fn = Callable[[Tensor], Any]  # (N, *S) -> (N, ...) or a tuple of such; row i depends on row i only


@final
@dataclass(frozen=True, eq=False)
class Target:
    """A function on batches, and what is needed to attack it fairly.

    Attributes:
        fn: The deployed behaviour, (N, *S) -> (N, ...). Success is always judged on it.
        module: The module whose mode is held and whose parameters are frozen during an attack; by default what stands
            behind `fn` and the views: a module, the owner of a bound method, what a function or a wrapper refers to.
        views: Named functions that the adversary may differentiate instead of `fn` (straight-through estimates, short
            chains, surrogates). An attack follows the first; the default is `fn` itself.
        draws: Gradients averaged per query (expectation over transformations), for stochastic targets.
        stochastic: Whether two calls on the same input may differ. None: found out by watching whether the first call
            draws from a global generator, or from one that the model holds.
        mode: "eval" holds the module in evaluation mode, "train" in training mode, "as-is" leaves it alone.
        features: The function up to the last hidden layer, for tests that need it.
        batch_size: The most images that go through the model at once.
    """

    fn: Fn
    module: nn.Module | None = None
    views: Mapping[str, Fn] = field(default_factory=dict)
    draws: int = 1
    stochastic: bool | None = None
    mode: Mode = "eval"
    features: Fn | None = None
    batch_size: int = 128

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise ArgumentError(f"fn={self.fn!r} must be callable: a torch module, a bound method or a function")
        if self.mode not in get_args(Mode):
            raise ArgumentError(f"mode={self.mode!r} must be one of {', '.join(get_args(Mode))}")
        for name in ("draws", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name}={value!r} must be a whole number, at least 1")
        object.__setattr__(self, "views", MappingProxyType(dict(self.views) or {"exact": self.fn}))
        found = self.module if self.module is not None else module_of(self.fn, *self.views.values())
        object.__setattr__(self, "module", found)

    def __reduce__(self) -> tuple[type[Target], tuple[Any, ...]]:
        """Pickled and copied by its fields, for workers; the views as the dictionary that they were given as."""
        return Target, (
            self.fn,
            self.module,
            dict(self.views),
            self.draws,
            self.stochastic,
            self.mode,
            self.features,
            self.batch_size,
        )

    @classmethod
    def of(cls, target: Target | nn.Module | Fn) -> Target:
        """A target as it is, or one made of a module, a bound method or a function."""
        return target if isinstance(target, Target) else cls(target)

    @property
    def view(self) -> Fn:
        """What a gradient attack differentiates: the first of the views."""
        return next(iter(self.views.values()))

    def seen(self, name: str) -> Target:
        """The same target with one view only.

        Raises:
            ArgumentError: There is no view of that name.
        """
        if name not in self.views:
            raise ArgumentError(f"view {name!r} does not exist; this target has {', '.join(self.views)}")
        return replace(self, views={name: self.views[name]})

    def fitting(self, most: int) -> Target:
        """The same target with at most so many images at once."""
        return self if most >= self.batch_size else replace(self, batch_size=most)

    @property
    def in_training(self) -> bool:
        """Whether any part of the module is in training mode as it stands."""
        return self.module is not None and any(getattr(part, "training", False) for part in self.module.modules())

    @property
    def generators(self) -> list[Any]:  # Any: of torch, numpy or Python
        """The random generators of the model's own."""
        return generators_of(self.fn, *self.views.values(), *([self.module] if self.module is not None else []))

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The module in the wanted mode with frozen parameters; everything is restored afterwards."""
        with frozen(self.module, self.mode):
            yield
