"""The options of `robustkit bench`: the plan that they specify, and the command that specifies a plan."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, final

from robustkit.bench.plan import specs
from robustkit.bench.plan.plan import NONE, Plan, attack_goal_pairs, default_plan, product
from robustkit.bench.plan.plan_file import read_plan
from robustkit.errors import ArgumentError

__all__ = ["Request", "command_of", "plan_of"]


@final
@dataclass(frozen=True)
class Request:
    """The options that specify a plan, as they were given; None for those that were not given."""

    plan: Path | None = None
    model: list[str] | None = None
    data: str | None = None
    limit: int | None = None
    offset: int | None = None
    threat: list[str] | None = None
    attack: list[str] | None = None
    goal: list[str] | None = None
    seed: int | None = None
    block: int | None = None
    batch_size: int | None = None
    device: str | None = None
    threads: int | None = None
    normalize: str | None = None
    save_adversarial: bool | None = None
    start_from: list[str] | None = None
    defence: list[str] | None = None

    def given(self) -> dict[str, Any]:  # Any: the type is that of the field
        """The options that were given, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name) is not None}

    def command(self) -> str:
        """The command with these options."""
        words = ["robustkit", "bench"]
        for name, value in self.given().items():
            option = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                words += [option] if value else []
            else:
                for item in value if isinstance(value, list) else [value]:
                    words += [option, str(item)]
        return shlex.join(words)


_LISTS = ("model", "defence", "threat", "attack", "goal")
_SETTINGS = (
    "offset",
    "limit",
    "seed",
    "block",
    "batch_size",
    "device",
    "threads",
    "normalize",
    "save_adversarial",
    "start_from",
)


def plan_of(request: Request) -> Plan:
    """The plan of a request: that of a file, or all combinations of the given options.

    Without a model, the default plan supplies what is not given.

    Raises:
        ArgumentError: A model is given without data or without a threat; or other options are given with a plan file.
    """
    given = request.given()
    if request.plan is not None:
        others = [name for name in given if name != "plan"]
        if others:
            raise ArgumentError(f"--{others[0].replace('_', '-')} cannot be combined with --plan; write it into {request.plan}")
        return read_plan(request.plan)
    if request.start_from is not None:
        given["start_from"] = tuple(dict.fromkeys(request.start_from))
    default = default_plan()
    if any(name in given for name in (*_LISTS, "data")):
        default = replace(default, limit=None)  # the limit of the default plan is for its own data and cases
    settings = {name: given[name] for name in _SETTINGS if name in given}
    if request.model and (request.data is None or request.threat is None):
        missing = "--data" if request.data is None else "--threat"
        raise ArgumentError(
            f"{missing} is missing; give the data and a threat, for example: "
            f"robustkit bench --model {request.model[0]} --data mnist-5k --threat linf:0.1"
        )
    cases = default.cases
    if any(name in given for name in _LISTS):
        threats = request.threat or dict.fromkeys(case.threat for case in cases)
        products = (
            product([model], [threat], _attacks_of(request, threat), [defence])
            for model in request.model or default.models
            for defence in request.defence or [NONE]
            for threat in threats
        )
        cases = tuple(dict.fromkeys(itertools.chain.from_iterable(products)))
    return replace(default, cases=cases, data=default.data if request.data is None else request.data, **settings)


def _attacks_of(request: Request, threat: str) -> list[tuple[str, str]]:
    """The pairs (attack, goal) for a threat: those given, else those of the default plan, or the strongest attack."""
    kind = threat.partition(":")[0]
    if not (request.attack or request.goal or request.model):
        kinds = {name: cls for name, cls, _ in specs.THREATS}
        cases = dict.fromkeys((case.attack, case.goal) for case in default_plan().cases)
        return [(attack, goal) for attack, goal in cases if kind not in kinds or specs.serves(attack, kinds[kind])]
    return attack_goal_pairs(threat, request.attack, request.goal)


def command_of(plan: Plan, file: str = "plan.toml") -> str:
    """The command that runs `plan`: with options if there are such options, else with the plan file `file`."""
    for request in _candidates(plan):
        if plan_of(request) == plan:
            return request.command()
    return Request(plan=Path(file)).command()


def _candidates(plan: Plan) -> Iterator[Request]:
    """Requests that may specify the plan, the shortest first."""
    settings: dict[str, Any] = {
        name: getattr(plan, name) for name in _SETTINGS if getattr(plan, name) != getattr(default_plan(), name)
    }
    if "start_from" in settings:
        settings["start_from"] = list(plan.start_from)
    yield Request(data=None if plan.data == default_plan().data else plan.data, **settings)
    settings |= {} if plan.limit is None else {"limit": plan.limit}
    lists: dict[str, Any] = {name: list(dict.fromkeys(getattr(case, name) for case in plan.cases)) for name in _LISTS}
    for name, default in (("goal", "misclassify"), ("defence", NONE)):
        if lists[name] == [default]:
            del lists[name]
    yield Request(data=plan.data, **lists, **settings)
