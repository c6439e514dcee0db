"""The words of `robustkit bench` and the plan that they mean, there and back."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, final

from robustkit.bench.plan import specs
from robustkit.bench.plan.plan import NONE, Plan, default_plan, pairs, product
from robustkit.bench.plan.plan_file import read_plan
from robustkit.errors import ArgumentError

__all__ = ["Request", "command_of", "plan_of"]


@final
@dataclass(frozen=True)
class Request:
    """What is to be measured, as it was asked for; None where it was not."""

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
        """What was asked for, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name) is not None}

    def command(self) -> str:
        """The words that ask for the same again, in a new folder."""
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
    """The plan of a request: that of a file, the default one where no model is named, or every combination of what is.

    Raises:
        ArgumentError: A model without data or threat; a plan with anything beside it.
    """
    given = request.given()
    if request.plan is not None:
        beside = [name for name in given if name != "plan"]
        if beside:
            raise ArgumentError(
                f"--{beside[0].replace('_', '-')} has no place beside --plan, which says all; write it into {request.plan}"
            )
        return read_plan(request.plan)
    if request.start_from is not None:
        given["start_from"] = tuple(dict.fromkeys(request.start_from))
    default = default_plan()
    if any(name in given for name in (*_LISTS, "data")):
        default = replace(default, limit=None)  # what somebody asks for is measured on all of their images
    settings = {name: given[name] for name in _SETTINGS if name in given}
    if request.model and (request.data is None or request.threat is None):
        missing = "--data" if request.data is None else "--threat"
        raise ArgumentError(
            f"{missing} is missing; say on what and against what, for example: "
            f"robustkit bench --model {request.model[0]} --data mnist-5k --threat linf:0.1"
        )
    cases = default.cases
    if any(name in given for name in _LISTS):
        threats = request.threat or dict.fromkeys(case.threat for case in cases)
        every = (
            product([model], [threat], _attacks_of(request, threat), [defence])
            for model in request.model or default.models
            for defence in request.defence or [NONE]
            for threat in threats
        )
        cases = tuple(dict.fromkeys(case for some in every for case in some))
    return replace(default, cases=cases, data=default.data if request.data is None else request.data, **settings)


def _attacks_of(request: Request, threat: str) -> list[tuple[str, str]]:
    """What is run in a threat, attacks with goals: those that are named, else those of the default plan, or the strongest."""
    kind = threat.partition(":")[0]
    if not (request.attack or request.goal or request.model):
        kinds = {name: cls for name, cls, _ in specs.THREATS}
        cases = dict.fromkeys((case.attack, case.goal) for case in default_plan().cases)
        return [(attack, goal) for attack, goal in cases if kind not in kinds or specs.serves(attack, kinds[kind])]
    return pairs(threat, request.attack, request.goal)


def command_of(plan: Plan, file: str = "plan.toml") -> str:
    """The command that runs `plan`: in words if words can say it, else by its file."""
    for request in _requests(plan):
        if plan_of(request) == plan:
            return request.command()
    return Request(plan=Path(file)).command()


def _requests(plan: Plan) -> Iterator[Request]:
    """What may mean the plan, from the shortest on."""
    settings: dict[str, Any] = {
        name: getattr(plan, name) for name in _SETTINGS if getattr(plan, name) != getattr(default_plan(), name)
    }
    if "start_from" in settings:
        settings["start_from"] = list(plan.start_from)
    yield Request(data=None if plan.data == default_plan().data else plan.data, **settings)
    settings |= {} if plan.limit is None else {"limit": plan.limit}
    lists: dict[str, Any] = {name: list(dict.fromkeys(getattr(case, name) for case in plan.cases)) for name in _LISTS}
    for name, usual in (("goal", "misclassify"), ("defence", NONE)):
        if lists[name] == [usual]:
            del lists[name]
    yield Request(data=plan.data, **lists, **settings)
