"""A case of a plan with its attack, threat and goal as objects."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from robustkit._engine.best_so_far import Keep
from robustkit.attack import Attack
from robustkit.attacks.universal import UniversalAttack
from robustkit.bench.plan import specs
from robustkit.bench.plan.plan import Case
from robustkit.bench.plan.plugins import Plugin
from robustkit.bench.plan.specs import GoalSpec
from robustkit.threats import Threat

__all__ = ["ResolvedCase", "keep_of", "resolve"]


@final
@dataclass(frozen=True)
class ResolvedCase:
    """A case, and the objects that its specs name.

    Attributes:
        case: The case.
        attack: Its attack.
        threat: Its threat.
        goal_spec: Its goal, and how the reference of the goal is computed.
        plugin: The package that provides the attack, whose errors are reported in one line; None for attacks of this package
            and those given as objects.
    """

    case: Case
    attack: Attack
    threat: Threat
    goal_spec: GoalSpec
    plugin: Plugin | None = None

    @property
    def is_universal(self) -> bool:
        """Whether the attack learns one perturbation for all images."""
        return isinstance(self.attack, UniversalAttack)


def resolve(cases: Iterable[Case]) -> list[ResolvedCase]:
    """Resolve the specs of cases.

    Raises:
        ArgumentError: A spec is invalid.
    """
    return [
        ResolvedCase(
            case, specs.attack(case.attack), specs.threat(case.threat), specs.goal(case.goal), specs.plugin(case.attack)
        )
        for case in cases
    ]


def keep_of(attack: Attack) -> Keep:
    """Which point of each image the bench keeps: the smallest of a minimum-norm attack, which gives the curve against eps."""
    return "smallest" if attack.minimum_norm else "first"
