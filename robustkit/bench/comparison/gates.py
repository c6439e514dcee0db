"""Gates for CI: conditions on a run that fail a build where a model is less robust than required."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, final

from robustkit.bench.comparison.compare import Pair, compare
from robustkit.bench.plan.plan import UNTARGETED, model_under_test_name
from robustkit.bench.results.read_run import Run
from robustkit.errors import ArgumentError

__all__ = ["Verdict", "fail_if_worse", "fail_under"]

_GROUP = ("model", "data", "defence", "threat")


@final
@dataclass(frozen=True)
class Verdict:
    """The outcome of a gate for one model in one threat.

    Attributes:
        name: The model, the threat and the condition, one line.
        passed: Whether the condition holds.
        why: The figures behind it, one line.
    """

    name: str
    passed: bool
    why: str


def fail_under(results: Mapping[str, Any], share: float) -> tuple[Verdict, ...]:
    """Whether the robust accuracy under the union of all attacks is at least a share, for each model and threat.

    The robust accuracy is an upper bound on the true one, so passing proves nothing more. If any record of the model in the
    threat has a flag, the figure cannot be believed and the gate fails, however high the figure is. Models and threats
    without an attack with the goal misclassify are skipped: robust accuracy under other goals is high by definition.

    Args:
        results: The content of results.json.
        share: The lowest robust accuracy that passes, in [0, 1].

    Raises:
        ArgumentError: `share` is not in [0, 1], or no attack had the goal misclassify.
    """
    _check_share("share", share)
    entries = [entry for entry in results["worst_case"] if any(_is_untargeted(attack) for attack in entry["attacks"])]
    if not entries:
        goals = sorted({record["goal"] for record in results["records"]})
        raise ArgumentError(
            f"share={share}: a gate needs an attack with goal misclassify, and this run has the goals {goals}; add such an "
            "attack, because only its robust accuracy measures the robustness of a model"
        )
    return tuple(_verdict_under(entry, results["records"], share) for entry in entries)


def fail_if_worse(now: Run, baseline: Run, margin: float) -> tuple[Verdict, ...]:
    """Whether the robust accuracy under all attacks fell by at most a margin, for each model and threat of a baseline.

    Images are counted exactly, so a fall of exactly the margin passes. The gate also fails on a flag that the baseline does
    not have, and on a model and threat of the baseline that this run did not attack, or not with the same attacks: omitting
    a measurement must not pass a gate. Models and threats of this run alone are not gated.

    Only robust accuracy is gated. An image that is wrong without an attack counts as broken, so a fall of clean accuracy
    matters here only where it costs robust accuracy.

    Args:
        now: The run to test.
        baseline: The run to compare it with.
        margin: The largest allowed fall of robust accuracy, in [0, 1].

    Raises:
        ArgumentError: `margin` is not in [0, 1], the runs cannot be compared, or no model and threat was attacked in the same
            way in both, with an attack of goal misclassify.
    """
    _check_share("margin", margin)
    try:
        comparison = compare(baseline, now)
    except ArgumentError as error:
        raise ArgumentError(f"the baseline is a, the run to test is b: {error}") from error
    pairs = [pair for pair in comparison.pairs if pair.worst_case and any(map(_is_untargeted, pair.attacks))]
    if not pairs:
        raise ArgumentError(
            f"baseline={str(baseline.path)!r} and now={str(now.path)!r} have no model and threat in common that both attacked "
            "in the same way with goal misclassify; run both with the same plan"
        )
    verdicts = {(pair.model_a, pair.data, pair.defence_a, pair.threat): _verdict_worse(pair, margin) for pair in pairs}
    untargeted = [record for record in baseline.results["records"] if record["goal"] == UNTARGETED]
    groups = {tuple(record[name] for name in _GROUP): record for record in untargeted}
    return tuple(verdicts.get(group) or _verdict_absent(record, margin) for group, record in groups.items())


def _verdict_under(entry: Mapping[str, Any], records: Sequence[Mapping[str, Any]], share: float) -> Verdict:
    group = [record for record in records if all(record[name] == entry[name] for name in _GROUP)]
    flags = sorted({flag["name"] for record in group for flag in record["flags"]})
    robust = entry["robust_accuracy"]
    reached = bool(robust >= share)  # both are nearest doubles of decimals: 29 of 100 is 0.29, so no slack is needed
    why = f"robust accuracy {_percent(robust)} on {entry['n']:,} images, {'at least' if reached else 'under'} {_percent(share)}"
    if flags:
        why += f"; flagged, do not believe it: {', '.join(flags)}"
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
    for flags, words in ((new, "new flag, do not believe it"), (old, "flagged like the baseline")):
        why += f"; {words}: {', '.join(flags)}" if flags else ""
    return Verdict(_worse(pair.model_b, pair.defence_b, pair.threat, margin), held and not new, _line(why))


def _verdict_absent(record: Mapping[str, Any], margin: float) -> Verdict:
    why = "measured in the baseline, but not in this run or with other attacks; make a new baseline if this is intended"
    return Verdict(_worse(record["model"], record["defence"], record["threat"], margin), False, why)


def _worse(model: str, defence: str | None, threat: str, margin: float) -> str:
    return _name(model, defence, threat, f"robust accuracy down by at most {_points(margin)}")


def _name(model: str, defence: str | None, threat: str, condition: str) -> str:
    return _line(f"{model_under_test_name(model, defence)}, {threat}: {condition}")


def _is_untargeted(attack: str) -> bool:
    """Whether an attack, given as "attack (goal)", has the goal misclassify."""
    return attack.endswith(f" ({UNTARGETED})")


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:  # NaN fails too
        percent = f"; {value:g} % is {value / 100:g}" if 1 < value <= 100 else ""
        raise ArgumentError(f"{name}={value:g} must be a share from 0 to 1{percent or '; write 0.9 for 90 %'}")


def _percent(share: float) -> str:
    """The share in percent with one to four decimals, without trailing zeros: 90.0%, 94.12%."""
    whole, _, digits = f"{100 * share:.4f}".rstrip("0").partition(".")
    return f"{whole}.{digits or 0}%"


def _points(margin: float) -> str:
    """A difference of two shares, in percentage points."""
    return _percent(margin).replace("%", " points")


def _line(text: str) -> str:
    """The text in one line; names may contain line breaks."""
    return " ".join(text.split())
