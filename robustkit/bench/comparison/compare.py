"""Two runs compared image by image, with paired tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from robustkit.bench.plan.plan import model_under_test_name
from robustkit.bench.results.read_run import Run
from robustkit.bench.results.record import robust_to_all
from robustkit.bench.results.solved_by import Solvers
from robustkit.bench.statistics.intervals import tango
from robustkit.bench.statistics.paired_tests import holm, mcnemar
from robustkit.errors import ArgumentError

__all__ = ["Comparison", "Pair", "StageComparison", "compare", "label"]

Record = Mapping[str, Any]  # a record of results.json: strings, numbers, and lists of {name, why}
Key = tuple[Hashable, ...]

_CASE = ("threat", "goal", "attack", "recipe", "seed", "data_hash")  # all but the model and the defence
_MAX_LABELS = 3  # records named in an error, which must stay one line


@final
@dataclass(frozen=True)
class StageComparison:
    """The images that one stage of an attack solved in run A and in run B.

    Attributes:
        name: The stage; "clean" for images that were wrong without an attack.
        a: Number of images solved in A.
        b: Number of images solved in B.
        both: Number of images solved in both.
    """

    name: str
    a: int
    b: int
    both: int


@final
@dataclass(frozen=True)
class Pair:
    """The robust images of run A and run B under the same attack, or under the union of the same attacks.

    Attributes:
        model_a: The model in A.
        model_b: The model in B.
        defence_a: The defence in A, if any.
        defence_b: The defence in B, if any.
        data: Data spec, as A names it.
        threat: Threat spec.
        attack: Attack spec; None for the worst case over attacks.
        goal: Goal spec; None likewise.
        seed: Seed of the run; None where records of several seeds are combined.
        attacks: The attacks that were run, each as "attack (goal)"; a single one for a record.
        n: Number of images.
        only_a: Number of images that are robust in A only.
        only_b: Number of images that are robust in B only.
        both: Number of images that are robust in both.
        neither: Number of images that are robust in neither.
        p: p value of McNemar's exact two-sided test.
        low: Lower end of the 95 % interval of the difference B - A, in [-1, 1].
        high: Upper end of it.
        flags_a: Names of the flags in A; do not believe its figure if there are any.
        flags_b: Names of the flags in B.
        stages: The images that each stage of a single attack solved, where that is known. They are not tested, because a
            stage sees only the images that the stages before it left unsolved.
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
    stages: tuple[StageComparison, ...] = ()

    @property
    def worst_case(self) -> bool:
        """Whether this pair is the worst case over the attacks of a threat."""
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
    """The records that two runs have in common, and those of one run only.

    Attributes:
        a: Folder of run A.
        b: Folder of run B.
        pairs: The records of A that B contains too, in their order; then the worst case over attacks, for each model and
            threat on which both ran the same attacks.
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
        """Number of different hypotheses; the worst case over a single attack is not a new one."""
        return len({_hypothesis(pair) for pair in self.pairs})

    @property
    def adjusted(self) -> tuple[float, ...]:
        """The p value of each pair, adjusted by Holm's method over all tests."""
        p = {_hypothesis(pair): pair.p for pair in self.pairs}
        adjusted = dict(zip(p, holm(tuple(p.values())), strict=True))
        return tuple(adjusted[_hypothesis(pair)] for pair in self.pairs)


def compare(a: Run, b: Run, solved: tuple[Solvers, Solvers] | None = None) -> Comparison:
    """Compare two runs on the same images, image by image.

    Two records are compared if their threat, goal, attack with all settings, seed, model and defence are equal. If each run
    has a single model, these two are compared whatever their names; likewise for a single defence, or none.

    Args:
        a: The reference, such as the version before.
        b: The run to compare with it, such as the version after.
        solved: The stage that solved each image in A and in B, from `solvers`; without it stages are not compared.

    Raises:
        ArgumentError: A run is empty or unfinished; the images, their number, the offset or the schema of the runs differ;
            or the runs have no record in common.
    """
    _refuse_unlike(a, b)
    by_name = [name for name in ("model", "defence") if not len(_values(a, name)) == len(_values(b, name)) == 1]
    rows_a, rows_b = _rows(a, (*_CASE, *by_name)), _rows(b, (*_CASE, *by_name))
    shared = [key for key in rows_a if key in rows_b]
    if not shared:
        raise ArgumentError(
            f"b={str(b.path)!r} has no record in common with a={str(a.path)!r}, and only equal attacks can be compared: "
            f"a has {_labels(a)}; b has {_labels(b)}; run both with the same plan"
        )
    groups_a, groups_b = _groups(a, rows_a, by_name), _groups(b, rows_b, by_name)
    same_attacks = [keys for group, keys in groups_a.items() if set(keys) == set(groups_b.get(group, ()))]
    pairs = [_pair(a, b, [(rows_a[key], rows_b[key])], worst_case=False) for key in shared]
    if solved is not None:
        rows = [(rows_a[key], rows_b[key]) for key in shared]
        pairs = [replace(pair, stages=_stages(a, b, row, solved)) for pair, row in zip(pairs, rows, strict=True)]
    pairs += [_pair(a, b, [(rows_a[key], rows_b[key]) for key in keys], worst_case=True) for keys in same_attacks]
    only_in_a = tuple(a.results["records"][row] for key, row in rows_a.items() if key not in rows_b)
    only_in_b = tuple(b.results["records"][row] for key, row in rows_b.items() if key not in rows_a)
    return Comparison(a.path, b.path, tuple(pairs), only_in_a, only_in_b)


def label(record: Record) -> str:
    """The case of a record in one line: all that must be equal for two records to be compared."""
    recipe = f" = {record['recipe']}" if record.get("recipe") else ""
    attack = f"{record['attack']}{recipe} ({record['goal']})"
    model = model_under_test_name(record["model"], record.get("defence"))
    return f"{model}, {record['threat']}, {attack}, seed {record['seed']}"


def _pair(a: Run, b: Run, rows: Sequence[tuple[int, int]], *, worst_case: bool) -> Pair:
    """The records of A and B in `rows`; of several, an image is robust where it is robust in all."""
    of_a, of_b = ([run.results["records"][row[side]] for row in rows] for side, run in enumerate((a, b)))
    robust_a = robust_to_all([a.robust[row] for row, _ in rows])
    robust_b = robust_to_all([b.robust[row] for _, row in rows])
    n, both = len(robust_a), int((robust_a & robust_b).sum())
    only_a, only_b = int(robust_a.sum()) - both, int(robust_b.sum()) - both
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
        attack=None if worst_case else first["attack"],
        goal=None if worst_case else first["goal"],
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


def _stages(a: Run, b: Run, row: tuple[int, int], solved: tuple[Solvers, Solvers]) -> tuple[StageComparison, ...]:
    """The images that each stage solved in the records of A and B in `row`, in the order of the stages."""
    records = [run.results["records"][at] for run, at in zip((a, b), row, strict=True)]
    names = dict.fromkeys(stage["name"] for record in records for stage in record.get("stages", ()))
    stages = []
    for name in names:
        in_a, in_b = (solvers[at] == name for solvers, at in zip(solved, row, strict=True))
        stages.append(StageComparison(name, int(in_a.sum()), int(in_b.sum()), int((in_a & in_b).sum())))
    return tuple(stages)


def _hypothesis(pair: Pair) -> Key:
    """What distinguishes one test from another; equal for a single attack and the worst case over this attack alone."""
    models = (pair.data, pair.model_a, pair.model_b, pair.defence_a, pair.defence_b)
    return (*models, pair.threat, pair.attacks, pair.seed, pair.only_a, pair.only_b)


def _flags(records: Iterable[Record]) -> tuple[str, ...]:
    return tuple(sorted({flag["name"] for record in records for flag in record["flags"]}))


def _values(run: Run, name: str) -> set[Any]:
    return {record.get(name) for record in run.results["records"]}


def _rows(run: Run, names: Sequence[str]) -> dict[Key, int]:
    """The index of the record of each case; equal records are numbered, so that each keeps a key of its own."""
    count: Counter[Key] = Counter()
    rows = {}
    for row, record in enumerate(run.results["records"]):
        key = tuple(record.get(name) for name in names)
        count[key] += 1
        rows[*key, count[key]] = row
    return rows


def _groups(run: Run, rows: Mapping[Key, int], by_name: Sequence[str]) -> dict[Key, list[Key]]:
    """The cases grouped by threat, data and model."""
    groups: dict[Key, list[Key]] = {}
    for key, row in rows.items():
        record = run.results["records"][row]
        groups.setdefault(tuple(record.get(name) for name in ("threat", "data_hash", *by_name)), []).append(key)
    return groups


def _labels(run: Run) -> str:
    labels = [repr(label(record)) for record in run.results["records"]]
    more = f" and {len(labels) - _MAX_LABELS} more" if len(labels) > _MAX_LABELS else ""
    return "; ".join(labels[:_MAX_LABELS]) + more


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
    """The value that all records of a run share; a sorted list of the values where they differ."""
    values = _values(run, name)
    return values.pop() if len(values) == 1 else sorted(values, key=repr)


def _offsets(a: Run, b: Run) -> tuple[Any, Any]:
    """The offsets into the data; None for both where one run does not state it."""
    data_of_runs = [run.results.get("data") for run in (a, b)]
    of_a, of_b = (data.get("offset") if isinstance(data, Mapping) else None for data in data_of_runs)
    return (of_a, of_b) if of_a is not None and of_b is not None else (None, None)


def _refuse_unfinished(name: str, run: Run) -> None:
    records = run.results["records"]
    lengths = [len(robust) for robust in run.robust]
    if not records or lengths != [record["n"] for record in records]:
        total = sum(record["n"] for record in records)
        raise ArgumentError(
            f"{name}={str(run.path)!r} is not finished: {sum(lengths)} of {total} results of single images in "
            f"{len(records)} records; finish it first, or name another run"
        )
    if None in _values(run, "data_hash"):
        raise ArgumentError(f"{name}={str(run.path)!r} has a record without data_hash, so its images are unknown; run it again")
