"""Gates: what a run must reach, so that a build may fail where a model is less robust than was promised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, final

from robustkit.bench.comparison.compare import Pair, compare
from robustkit.bench.results.read_run import Run
from robustkit.errors import ArgumentError

__all__ = ["Verdict", "fail_if_worse", "fail_under"]

_UNTARGETED = "misclassify"  # the one goal under which robust accuracy says how robust a model is
_SUBJECT = ("model", "data", "defence", "threat")


@final
@dataclass(frozen=True)
class Verdict:
    """What a gate says of one model in one threat.

    Attributes:
        name: What was asked of whom, one line.
        passed: Whether it holds.
        why: The figures that say so, one line.
    """

    name: str
    passed: bool
    why: str


def fail_under(results: Mapping[str, Any], share: float) -> tuple[Verdict, ...]:
    """Whether at least a share of the images survives all attacks together, for each model and threat.

    The figure is an upper bound on the truth, and so is what passes here. Where any record of the model in that threat
    carries a flag, the figure may not be believed, and it passes no gate, however high it is. Models and threats without an
    attack of goal misclassify are left out: robust accuracy under other goals is high by definition.

    Args:
        results: The content of results.json.
        share: The least robust accuracy that passes, in [0, 1].

    Raises:
        ArgumentError: `share` is not in [0, 1], or no attack had the goal misclassify.
    """
    _check_share("share", share)
    entries = [entry for entry in results["worst_case"] if any(_is_untargeted(attack) for attack in entry["attacks"])]
    if not entries:
        goals = sorted({record["goal"] for record in results["records"]})
        raise ArgumentError(
            f"share={share}: a gate needs an attack with goal misclassify, and this run holds the goals {goals}; add one, for "
            "only what survives it says how robust a model is"
        )
    return tuple(_verdict_under(entry, results["records"], share) for entry in entries)


def fail_if_worse(now: Run, baseline: Run, margin: float) -> tuple[Verdict, ...]:
    """Whether robust accuracy, all attacks together, fell by at most a margin, for each model and threat of a baseline.

    Counted on the very same images, so that a fall of exactly the margin passes, whatever floating point makes of it. A flag
    that the baseline does not have there fails too, and so does what the baseline has measured and this run has not, or with
    other attacks: a gate is not passed by leaving out what it looks at. What only this run holds is not gated.

    Only robust accuracy is gated. An image that the model gets wrong without any attack counts as broken, so a fall of clean
    accuracy is seen here as far as it costs robustness; beyond that it is for the tests of the model itself, and often the
    price that was meant to be paid.

    Args:
        now: The run to be judged.
        baseline: The run that it is held to.
        margin: By how much the share of surviving images may fall, in [0, 1]; 0 lets nothing fall.

    Raises:
        ArgumentError: `margin` is not in [0, 1], the runs cannot be compared, or there is no model and threat that both have
            attacked in the same way with an attack of goal misclassify.
    """
    _check_share("margin", margin)
    try:
        comparison = compare(baseline, now)
    except ArgumentError as error:
        raise ArgumentError(f"the baseline is a, the run to be judged b: {error}") from error
    pairs = [pair for pair in comparison.pairs if pair.worst_case and any(map(_is_untargeted, pair.attacks))]
    if not pairs:
        raise ArgumentError(
            f"baseline={str(baseline.path)!r} and now={str(now.path)!r} have no model and threat in common that both attacked "
            "in the same ways, goal misclassify among them; run both with the same plan"
        )
    found = {(pair.model_a, pair.data, pair.defence_a, pair.threat): _verdict_worse(pair, margin) for pair in pairs}
    wanted = [record for record in baseline.results["records"] if record["goal"] == _UNTARGETED]
    groups = {tuple(record[name] for name in _SUBJECT): record for record in wanted}
    return tuple(found.get(group) or _verdict_absent(record, margin) for group, record in groups.items())


def _verdict_under(entry: Mapping[str, Any], records: Sequence[Mapping[str, Any]], share: float) -> Verdict:
    mine = [record for record in records if all(record[name] == entry[name] for name in _SUBJECT)]
    flags = sorted({flag["name"] for record in mine for flag in record["flags"]})
    robust = entry["robust_accuracy"]
    reached = bool(robust >= share)  # both are nearest doubles of decimals: 29 of 100 is 0.29, so no slack is needed
    why = f"robust accuracy {_percent(robust)} on {entry['n']:,} images, {'at least' if reached else 'under'} {_percent(share)}"
    if flags:
        why += f"; flagged, so that it may not be believed: {', '.join(flags)}"
    name = _name(entry["model"], entry["defence"], entry["threat"], f"robust accuracy at least {_percent(share)}")
    return Verdict(name, reached and not flags, _line(why))


def _verdict_worse(pair: Pair, margin: float) -> Verdict:
    # The decimal that was written, not its double: 0.29 * 100 is 28.999999999999996, and a fall of 29 images of 100 passes.
    allowed = Fraction(repr(float(margin))) * pair.n
    fell, new = pair.only_a - pair.only_b, sorted(set(pair.flags_b) - set(pair.flags_a))
    held = fell <= allowed
    whose = "" if pair.model_a == pair.model_b else f" ({pair.model_a})"
    why = (
        f"robust accuracy {_percent(pair.robust_a)} in the baseline{whose}, {_percent(pair.robust_b)} now: {pair.only_a:,} of "
        f"{pair.n:,} images lost, {pair.only_b:,} won, {'at most' if held else 'more than'} {_points(margin)} down, "
        f"p = {pair.p:.2g}"
    )
    old = sorted(set(pair.flags_a) & set(pair.flags_b))
    for flags, words in ((new, "new flag, so that it may not be believed"), (old, "flagged as the baseline is")):
        why += f"; {words}: {', '.join(flags)}" if flags else ""
    return Verdict(_worse(pair.model_b, pair.defence_b, pair.threat, margin), held and not new, _line(why))


def _verdict_absent(record: Mapping[str, Any], margin: float) -> Verdict:
    why = "measured in the baseline, and not in this run, or with other attacks; make a new baseline if that is meant"
    return Verdict(_worse(record["model"], record["defence"], record["threat"], margin), False, why)


def _worse(model: str, defence: str | None, threat: str, margin: float) -> str:
    return _name(model, defence, threat, f"robust accuracy down by at most {_points(margin)}")


def _name(model: str, defence: str | None, threat: str, asked: str) -> str:
    return _line(f"{model}{f' with {defence}' if defence else ''}, {threat}: {asked}")


def _is_untargeted(attack: str) -> bool:
    """Whether an attack that is told as "attack (goal)" wanted nothing but a wrong answer."""
    return attack.endswith(f" ({_UNTARGETED})")


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:  # also where it is not a number
        percent = f"; {value:g} % is {value / 100:g}" if 1 < value <= 100 else ""
        raise ArgumentError(f"{name}={value:g} must be a share from 0 to 1{percent or '; write 0.9 for 90 %'}")


def _percent(share: float) -> str:
    """The share with as many digits as it has, at least one, at most four: 90.0%, 94.12%."""
    whole, _, digits = f"{100 * share:.4f}".rstrip("0").partition(".")
    return f"{whole}.{digits or 0}%"


def _points(margin: float) -> str:
    """A fall from one share to another, which is no share of either."""
    return _percent(margin).replace("%", " points")


def _line(text: str) -> str:
    """Names may hold line breaks."""
    return " ".join(text.split())
