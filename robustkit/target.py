"""The target of an attack: a function, the module that it runs, and the functions that an adversary may differentiate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, final, get_args

from torch import Tensor, nn

from robustkit._engine.field_checks import at_least
from robustkit._engine.introspection import generators_of, module_of
from robustkit._engine.state_guard import Mode, frozen
from robustkit.errors import ArgumentError

__all__ = ["Fn", "Target"]

Fn = Callable[[Tensor], Any]  # (N, *S) -> (N, ...) or a tuple of such tensors; row i depends on row i only


@final
@dataclass(frozen=True, eq=False)
class Target:
    """A function on batches, and what an attack has to know about it.

    Attributes:
        fn: The deployed function, (N, *S) -> (N, ...). Success is always evaluated on it.
        module: The module whose mode is set and whose parameters are frozen during an attack. By default it is found from
            `fn` and the views: a module itself, the owner of a bound method, or what a function or wrapper refers to.
        views: Named functions that the adversary may differentiate instead of `fn` (straight-through estimates, short
            chains, surrogates). Attacks use the first; the default is `fn` itself.
        draws: Number of gradients averaged per query (expectation over transformation), for stochastic targets.
        stochastic: Whether two calls on the same input may differ. None: detected by whether the first call draws from a
            global random generator or from one that the model holds.
        mode: "eval" puts the module in evaluation mode, "train" in training mode, "as-is" leaves it alone.
        features: The function up to the last hidden layer, for checks that need it.
        batch_size: The largest batch for the model.

    Raises:
        ArgumentError: `fn` is not callable, `mode` is unknown, or `draws` or `batch_size` is not an integer of at least 1.
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
        at_least(1, draws=self.draws, batch_size=self.batch_size)
        object.__setattr__(self, "views", MappingProxyType(dict(self.views) or {"exact": self.fn}))
        module = self.module if self.module is not None else module_of(self.fn, *self.views.values())
        object.__setattr__(self, "module", module)

    def __reduce__(self) -> tuple[type[Target], tuple[Any, ...]]:
        """Pickle and copy by the fields; a mapping proxy cannot be pickled, so the views become a dict."""
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
        """The target itself, or a new one for a module, a bound method or a function."""
        return target if isinstance(target, Target) else cls(target)

    @property
    def view(self) -> Fn:
        """The function that a gradient attack differentiates: the first view."""
        return next(iter(self.views.values()))

    def with_view(self, name: str) -> Target:
        """A copy with only the view `name`.

        Raises:
            ArgumentError: There is no view of that name.
        """
        if name not in self.views:
            raise ArgumentError(f"view {name!r} does not exist; this target has {', '.join(self.views)}")
        return replace(self, views={name: self.views[name]})

    def with_max_batch_size(self, size: int) -> Target:
        """The target with batches of at most `size` examples."""
        return self if size >= self.batch_size else replace(self, batch_size=size)

    @property
    def in_training(self) -> bool:
        """Whether the module or any submodule is in training mode at present."""
        return self.module is not None and any(getattr(part, "training", False) for part in self.module.modules())

    @property
    def generators(self) -> list[Any]:  # Any: of torch, numpy or Python
        """The random generators that the model holds."""
        return generators_of(self.fn, *self.views.values(), *([self.module] if self.module is not None else []))

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """A context with the module in `mode` and its parameters frozen; the module is restored on exit."""
        with frozen(self.module, self.mode):
            yield
