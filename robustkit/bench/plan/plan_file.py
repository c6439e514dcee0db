"""Plans as TOML files. Unknown names are errors; a plan that is written and read again is equal."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import tomli_w

from robustkit.bench.plan.plan import NONE, Case, Plan, attack_goal_pairs, product
from robustkit.errors import ArgumentError

__all__ = ["plan_text", "read_plan"]

Table = Mapping[str, Any]  # Any: a TOML value; each is checked before it is used

_LISTS = ("models", "defences", "threats", "attacks", "goals")
_SETTINGS = tuple(field.name for field in fields(Plan) if field.name not in ("cases", "expected_hashes", "start_from"))
_KINDS: tuple[tuple[type, str], ...] = ((bool, "true or false"), (int, "a whole number"), (str, "a string"))
_HEAD = "# The plan of a run of `robustkit bench`. It is only run on data and weights with these hashes.\n\n"


def plan_text(plan: Plan) -> str:
    """The plan as TOML; `read_plan` gives an equal plan with the same hashes.

    Raises:
        ArgumentError: A spec is not valid Unicode, which is possible for a file name.
    """
    settings = {name: getattr(plan, name) for name in _SETTINGS if getattr(plan, name) is not None}
    cases = [asdict(case) for case in plan.cases]
    starts = {"start_from": list(plan.start_from)} if plan.start_from else {}
    try:
        text = _HEAD + tomli_w.dumps(settings | starts | {"hashes": dict(plan.expected_hashes), "cases": cases})
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ArgumentError(f"a name in the plan is not valid Unicode ({error.object!r}); rename that file") from error
    return text


def read_plan(path: Path) -> Plan:
    """Read a plan from a TOML file.

    Keys: `data` is required; `offset`, `limit`, `seed`, `block`, `batch_size`, `device`, `threads`, `normalize` and
    `save_adversarial` are optional. All combinations of the lists `models`, `defences`, `threats`, `attacks` and `goals` become
    cases; a table `[[cases]]` with model, threat, attack, goal and defence is a single case. The list `start_from` names
    earlier runs. `[hashes]` has the expected hashes of the data, the weights and those runs.

    Raises:
        ArgumentError: The file cannot be read, is not TOML, or has an unknown name or an invalid value.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"plan={str(path)!r} cannot be read ({error}); name a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise ArgumentError(f"plan={str(path)!r} is not TOML: {error}; correct that line") from error
    try:
        return _plan(table)
    except ArgumentError as error:
        raise ArgumentError(f"plan={str(path)!r}: {error}") from error


def _plan(table: Table) -> Plan:
    _check_names(table, (*_SETTINGS, *_LISTS, "start_from", "cases", "hashes"), "the plan")
    settings = {name: _value(table, name, kind) for name, kind in _kinds() if name in table}
    if "data" not in settings:
        raise ArgumentError('data is missing; name the data, for example: data = "mnist-5k"')
    cases = (*_combined_cases(table), *_single_cases(table))
    starts = tuple(_strings(table, "start_from"))
    return Plan(cases=tuple(dict.fromkeys(cases)), start_from=starts, expected_hashes=_expected_hashes(table), **settings)


def _kinds() -> list[tuple[str, type]]:
    """The type of each setting, from its annotation."""
    annotations = {field.name: str(field.type) for field in fields(Plan)}
    kinds = {"str": str, "int": int, "bool": bool}
    return [(name, kinds[annotations[name].split(" |")[0]]) for name in _SETTINGS]


def _combined_cases(table: Table) -> tuple[Case, ...]:
    lists = {name: _strings(table, name) for name in _LISTS}
    if not any(lists.values()):
        return ()
    for name in ("models", "threats"):
        if not lists[name]:
            raise ArgumentError(
                f'{name} is missing, and {next(n for n in _LISTS if lists[n])} needs it; write {name} = ["..."]'
            )
    return tuple(
        case
        for model in lists["models"]
        for defence in lists["defences"] or [NONE]
        for threat in lists["threats"]
        for case in product([model], [threat], attack_goal_pairs(threat, lists["attacks"], lists["goals"]), [defence])
    )


def _single_cases(table: Table) -> list[Case]:
    rows = table.get("cases", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ArgumentError("cases must be tables: [[cases]] followed by model, threat, attack and goal, one per line")
    names = tuple(field.name for field in fields(Case))
    for number, row in enumerate(rows, start=1):
        _check_names(row, names, f"case {number}")
        missing = [name for name in names if name not in row and name not in ("goal", "defence")]
        if missing:
            raise ArgumentError(f"case {number} has no {missing[0]}; it needs model, threat and attack")
    return [Case(**{name: _value(row, name, str) for name in row}) for row in rows]


def _expected_hashes(table: Table) -> dict[str, str]:
    hashes = table.get("hashes", {})
    if not isinstance(hashes, dict):
        raise ArgumentError("hashes must be a table: [hashes] followed by spec = hash, one per line; or leave it out")
    return {name: _value(hashes, name, str) for name in hashes}


def _check_names(table: Table, known: tuple[str, ...], where: str) -> None:
    for name in table:
        if name not in known:
            raise ArgumentError(f"{name!r} is not a key of {where}; its keys are {', '.join(known)}")


def _strings(table: Table, name: str) -> list[str]:
    values = table.get(name, [])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ArgumentError(f'{name}={values!r} must be a list of strings: {name} = ["..."]')
    return values


def _value(table: Table, name: str, kind: type) -> Any:
    value = table[name]
    if type(value) is not kind:  # not isinstance: True is an int
        raise ArgumentError(f"{name}={value!r} must be {dict(_KINDS)[kind]}")
    return value
