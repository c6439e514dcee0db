"""How a process gets the function that computes blocks: the parent has it, and a worker loads the plan again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

from robustkit.bench.execution.loaded_run import LoadedRun, load
from robustkit.bench.plan.plan import Plan
from robustkit.bench.results.block import Block, Task
from robustkit.bench.results.store import Store
from robustkit.errors import ArgumentError

__all__ = ["RunLoader"]


@final
@dataclass(frozen=True)
class RunLoader:
    """Makes the function that computes chains of blocks, here or, after pickling, in a worker process.

    Only the plan is sent to a worker, which loads the rest itself.

    Attributes:
        plan: The plan.
        loaded: The loaded run in the process that made it; None in a worker.
        fingerprints: The fingerprint of each model in that process.
        store: A store in which other processes find blocks; None if there is none.
    """

    plan: Plan
    loaded: LoadedRun | None = field(default=None, compare=False, repr=False)
    fingerprints: tuple[tuple[str, str], ...] = ()
    store: Store | None = None

    def __reduce__(self) -> tuple[type[RunLoader], tuple[Any, ...]]:
        fingerprints = self.fingerprints if self.loaded is None else tuple(self.loaded.fingerprints.items())
        return RunLoader, (self.plan, None, fingerprints, self.store)

    def __call__(self) -> Callable[[Sequence[Task]], list[Block]]:
        """Return the function that computes the blocks of a chain.

        Raises:
            ArgumentError: A model has other outputs in a worker than in its parent.
        """
        if self.loaded is not None:
            return partial(self.loaded.measure_chain, store=self.store)
        loaded = load(self.plan)
        for spec, fingerprint in self.fingerprints:
            if loaded.fingerprints[spec] != fingerprint:
                raise ArgumentError(
                    f"model {spec!r} is not reproducible: a worker process gets other outputs; seed what it draws at random"
                )
        return partial(loaded.measure_chain, store=self.store)
