"""Two runs side by side, image by image: what changed, and by more than chance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any, final

from scipy.stats import binomtest

from robustkit.bench.results.read_run import Run
from robustkit.bench.results.record import surviving
from robustkit.bench.results.solved_by import Solvers
from robustkit.errors import ArgumentError

__all__ = ["Comparison", "Pair", "StagePair", "compare", "holm", "label", "mcnemar", "tango"]

Record = Mapping[str, Any]  # a record of results.json: strings, numbers, and lists of {name, why}
Key = tuple[Hashable, ...]

_CASE = ("threat", "goal", "attack", "recipe", "seed", "data_hash")  # what was asked; of whom: model and defence
_Z = 1.959963984540054  # the 97.5 % point of the normal distribution
_TOLD = 3  # records named in an error, so that it stays a line


@final
@dataclass(frozen=True)
class StagePair:
    """What one stage of an attack solved in run A and in run B, of the same images.

    Attributes:
        name: Of the stage; "clean" are images that needed no attack.
        a: How many it solved in A.
        b: How many it solved in B.
        both: How many it solved in both.
    """

    name: str
    a: int
    b: int
    both: int


@final
@dataclass(frozen=True)
class Pair:
    """What the same attack, or all attacks together, left right in run A and in run B, on the same images.

    Attributes:
        model_a: What was attacked in A.
        model_b: What was attacked in B.
        defence_a: The defence of A, if any.
        defence_b: The defence of B, if any.
        data: Data spec, as A names it.
        threat: What might change.
        attack: The attack's spec; None where it is all attacks together.
        goal: The goal's spec; None likewise.
        seed: Of all noise; None where several seeds stand together.
        attacks: What was run, each as "attack (goal)"; a single one for a record.
        n: How many images.
        only_a: How many stay right in A alone.
        only_b: How many stay right in B alone.
        both: How many stay right in both.
        neither: How many stay right in neither.
        p: McNemar's exact two-sided test that neither is better.
        low: Lower end of the 95 % interval of B - A, a share in [-1, 1].
        high: Its upper end.
        flags_a: Names of the alarms in A; its figure may not be believed where there are any.
        flags_b: Names of the alarms in B.
        stages: What each stage of a single attack solved, where that is known; no tests, as every stage sees only what the
            ones before it have left.
    """

    model_a: str
    model_b: str
    defence_a: str | None
    defence_b: str | None
    data: str
    threat: str
    attack: str | None
    goal: str | None
    seed: int | None
    attacks: tuple[str, ...]
    n: int
    only_a: int
    only_b: int
    both: int
    neither: int
    p: float
    low: float
    high: float
    flags_a: tuple[str, ...]
    flags_b: tuple[str, ...]
    stages: tuple[StagePair, ...] = ()

    @property
    def worst_case(self) -> bool:
        """Whether this is what survives all attacks of a threat."""
        return self.attack is None

    @property
    def robust_a(self) -> float:
        """Robust accuracy of A, in [0, 1]."""
        return (self.both + self.only_a) / self.n

    @property
    def robust_b(self) -> float:
        """Robust accuracy of B, in [0, 1]."""
        return (self.both + self.only_b) / self.n

    @property
    def difference(self) -> float:
        """B - A, in [-1, 1]."""
        return (self.only_b - self.only_a) / self.n


@final
@dataclass(frozen=True, eq=False)
class Comparison:
    """What two runs have in common, and what only one of them holds.

    Attributes:
        a: Folder of run A.
        b: Folder of run B.
        pairs: The records of A that B holds too, in their order; then all attacks together, for each model and threat on
            which both ran the same ones.
        only_in_a: Records of A without a counterpart.
        only_in_b: Records of B without a counterpart.
    """

    a: Path
    b: Path
    pairs: tuple[Pair, ...]
    only_in_a: tuple[Record, ...]
    only_in_b: tuple[Record, ...]

    @property
    def tests(self) -> int:
        """How many different questions were put; all attacks together is no new one where there is a single attack."""
        return len({_question(pair) for pair in self.pairs})

    @property
    def adjusted(self) -> tuple[float, ...]:
        """For each pair, p by Holm's method over all tests."""
        asked = {_question(pair): pair.p for pair in self.pairs}
        of = dict(zip(asked, holm(tuple(asked.values())), strict=True))
        return tuple(of[_question(pair)] for pair in self.pairs)


def compare(a: Run, b: Run, solved: tuple[Solvers, Solvers] | None = None) -> Comparison:
    """Compare two runs on the same images, image by image.

    Two records belong together if threat, goal, attack with all its settings, seed, model and defence are the same. Where
    each run holds a single model these two are compared whatever their names; likewise a single defence, or none.

    Args:
        a: What is compared with, as the version before.
        b: What is compared, as the version after.
        solved: Which stage solved which image in A and in B, from `solvers`; without it no stages are compared.

    Raises:
        ArgumentError: A run is empty or unfinished; the images, their number, the offset or the schema of the runs differ;
            or they have no record in common.
    """
    _refuse_unlike(a, b)
    subject = [name for name in ("model", "defence") if not len(_values(a, name)) == len(_values(b, name)) == 1]
    rows_a, rows_b = _rows(a, (*_CASE, *subject)), _rows(b, (*_CASE, *subject))
    shared = [key for key in rows_a if key in rows_b]
    if not shared:
        raise ArgumentError(
            f"b={str(b.path)!r} has no record in common with a={str(a.path)!r}, and only equal attacks can be compared: "
            f"a holds {_told(a)}; b holds {_told(b)}; run both with the same plan"
        )
    groups_a, groups_b = _groups(a, rows_a, subject), _groups(b, rows_b, subject)
    whole = [keys for group, keys in groups_a.items() if set(keys) == set(groups_b.get(group, ()))]
    pairs = [_pair(a, b, [(rows_a[key], rows_b[key])], together=False) for key in shared]
    if solved is not None:
        rows = [(rows_a[key], rows_b[key]) for key in shared]
        pairs = [replace(pair, stages=_stages(a, b, row, solved)) for pair, row in zip(pairs, rows, strict=True)]
    pairs += [_pair(a, b, [(rows_a[key], rows_b[key]) for key in keys], together=True) for keys in whole]
    left_a = tuple(a.results["records"][row] for key, row in rows_a.items() if key not in rows_b)
    left_b = tuple(b.results["records"][row] for key, row in rows_b.items() if key not in rows_a)
    return Comparison(a.path, b.path, tuple(pairs), left_a, left_b)


def mcnemar(only_a: int, only_b: int) -> float:
    """McNemar's exact two-sided p: were the images that differ as likely to be right in A as in B? 1 where none differs."""
    return float(binomtest(only_b, only_a + only_b).pvalue) if only_a + only_b else 1.0


def tango(only_a: int, only_b: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of the difference B - A of two shares of the same n images (Tango 1998, Stat. Med. 17:891).

    It inverts the asymptotic form of McNemar's test, so it rests, as that does, on the images that differ and on n; it
    stays wide enough where hardly any does, as between two versions of a model. The exact p is the stricter of the two: it
    can exceed 0.05 where the interval just leaves out 0.

    Returns:
        Both ends, shares in [-1, 1].
    """
    return 0.0 - _upper(only_a, only_b, n), _upper(only_b, only_a, n)  # not -0.0


def holm(p: Sequence[float]) -> tuple[float, ...]:
    """The p values adjusted for their number (Holm 1979): each at most 0.05 with at most 5 % chance of any false alarm."""
    adjusted, least = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        least = max(least, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = least
    return tuple(adjusted)


def label(record: Record) -> str:
    """What a record is about: all that must be equal for two to be compared."""
    defence = f" with {record['defence']}" if record.get("defence") else ""
    recipe = f" = {record['recipe']}" if record.get("recipe") else ""
    attack = f"{record['attack']}{recipe} ({record['goal']})"
    return f"{record['model']}{defence}, {record['threat']}, {attack}, seed {record['seed']}"


def _upper(more: int, fewer: int, n: int) -> float:
    """Upper end of Tango's interval of (more - fewer) / n, by bisection between the estimate and 1."""
    inside, outside = (more - fewer) / n, 1.0
    for _ in range(60):
        delta = (inside + outside) / 2
        linear = more + fewer - (2 * n - more + fewer) * delta
        # The most likely share of `fewer` if the difference were delta.
        share = (sqrt(max(0.0, linear**2 + 8 * n * fewer * delta * (1 - delta))) + linear) / (4 * n)
        variance = n * (2 * share + delta * (1 - delta))
        if (more - fewer - n * delta) ** 2 <= _Z**2 * variance:
            inside = delta
        else:
            outside = delta
    return inside


def _pair(a: Run, b: Run, rows: Sequence[tuple[int, int]], *, together: bool) -> Pair:
    """The records of A and B in `rows`; several are taken together as `together` of bench.record does."""
    of_a, of_b = ([run.results["records"][row[side]] for row in rows] for side, run in enumerate((a, b)))
    right_a = surviving([a.robust[row] for row, _ in rows])
    right_b = surviving([b.robust[row] for _, row in rows])
    n, both = len(right_a), int((right_a & right_b).sum())
    only_a, only_b = int(right_a.sum()) - both, int(right_b.sum()) - both
    low, high = tango(only_a, only_b, n)
    first, other = of_a[0], of_b[0]
    seeds = {record["seed"] for record in of_a}
    return Pair(
        first["model"],
        other["model"],
        first["defence"],
        other["defence"],
        first["data"],
        first["threat"],
        attack=None if together else first["attack"],
        goal=None if together else first["goal"],
        seed=first["seed"] if len(seeds) == 1 else None,
        attacks=tuple(f"{record['attack']} ({record['goal']})" for record in of_a),
        n=n,
        only_a=only_a,
        only_b=only_b,
        both=both,
        neither=n - both - only_a - only_b,
        p=mcnemar(only_a, only_b),
        low=low,
        high=high,
        flags_a=_flags(of_a),
        flags_b=_flags(of_b),
    )


def _stages(a: Run, b: Run, row: tuple[int, int], solved: tuple[Solvers, Solvers]) -> tuple[StagePair, ...]:
    """What each stage solved in the records of A and B in `row`, in the order of the stages."""
    records = [run.results["records"][at] for run, at in zip((a, b), row, strict=True)]
    names = dict.fromkeys(stage["name"] for record in records for stage in record.get("stages", ()))
    found = []
    for name in names:
        in_a, in_b = (of[at] == name for of, at in zip(solved, row, strict=True))
        found.append(StagePair(name, int(in_a.sum()), int(in_b.sum()), int((in_a & in_b).sum())))
    return tuple(found)


def _question(pair: Pair) -> Key:
    """What tells one test from another; equal for a single attack and the same attack as "all together"."""
    whom = (pair.data, pair.model_a, pair.model_b, pair.defence_a, pair.defence_b)
    return (*whom, pair.threat, pair.attacks, pair.seed, pair.only_a, pair.only_b)


def _flags(records: Iterable[Record]) -> tuple[str, ...]:
    return tuple(sorted({flag["name"] for record in records for flag in record["flags"]}))


def _values(run: Run, name: str) -> set[Any]:
    return {record.get(name) for record in run.results["records"]}


def _rows(run: Run, names: Sequence[str]) -> dict[Key, int]:
    """Where the record of each case stands; of equal ones the first, the second and so on are cases of their own."""
    seen: Counter[Key] = Counter()
    rows = {}
    for row, record in enumerate(run.results["records"]):
        key = tuple(record.get(name) for name in names)
        seen[key] += 1
        rows[*key, seen[key]] = row
    return rows


def _groups(run: Run, rows: Mapping[Key, int], subject: Sequence[str]) -> dict[Key, list[Key]]:
    """The cases by what was attacked in which threat."""
    groups: dict[Key, list[Key]] = {}
    for key, row in rows.items():
        record = run.results["records"][row]
        groups.setdefault(tuple(record.get(name) for name in ("threat", "data_hash", *subject)), []).append(key)
    return groups


def _told(run: Run) -> str:
    labels = [repr(label(record)) for record in run.results["records"]]
    more = f" and {len(labels) - _TOLD} more" if len(labels) > _TOLD else ""
    return "; ".join(labels[:_TOLD]) + more


def _refuse_unlike(a: Run, b: Run) -> None:
    for name, run in (("a", a), ("b", b)):
        _refuse_unfinished(name, run)
    same_images = "give both runs the same data, limit and offset"
    for what, of_a, of_b, way_out in (
        ("schema", a.results.get("schema"), b.results.get("schema"), "make both with the same version of robustkit"),
        ("data_hash", *(_one(run, "data_hash") for run in (a, b)), same_images),
        ("n", *(_one(run, "n") for run in (a, b)), same_images),
        ("offset", *_offsets(a, b), same_images),
    ):
        if of_a != of_b:
            raise ArgumentError(
                f"b={str(b.path)!r} has {what} {of_b!r} and a={str(a.path)!r} has {of_a!r}; only runs on the same images can "
                f"be compared one image at a time: {way_out}"
            )


def _one(run: Run, name: str) -> Any:
    """What all records of a run hold under a name; all that they hold, where they are not at one."""
    values = _values(run, name)
    return values.pop() if len(values) == 1 else sorted(values, key=repr)


def _offsets(a: Run, b: Run) -> tuple[Any, Any]:
    """How many examples were passed over; the same for both where one does not say."""
    told = [run.results.get("data") for run in (a, b)]
    of_a, of_b = (data.get("offset") if isinstance(data, Mapping) else None for data in told)
    return (of_a, of_b) if of_a is not None and of_b is not None else (None, None)


def _refuse_unfinished(name: str, run: Run) -> None:
    records = run.results["records"]
    lengths = [len(robust) for robust in run.robust]
    if not records or lengths != [record["n"] for record in records]:
        wanted = sum(record["n"] for record in records)
        raise ArgumentError(
            f"{name}={str(run.path)!r} is not finished: {sum(lengths)} of {wanted} results of single images in "
            f"{len(records)} records; finish it first, or name another run"
        )
    if None in _values(run, "data_hash"):
        raise ArgumentError(
            f"{name}={str(run.path)!r} has a record without data_hash, so nobody can say which images it saw; run it again"
        )
