"""A comparison of two runs as a table for the terminal and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from robustkit.bench.comparison.compare import Comparison, Pair, label
from robustkit.bench.plan.plan import UNTARGETED, model_under_test_name
from robustkit.bench.reporting.curve_charts import COMMON_STAGES

__all__ = ["as_json", "comparison_table"]

_LEVEL = 0.05  # adjusted p below which a difference is significant


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison ready for `json.dumps`.

    Returns:
        The folders `a` and `b`; `tests`, the number of tests; `pairs`, each with the fields of `Pair`, `robust_a`, `robust_b`,
        `difference` and `p_holm`; `only_in_a` and `only_in_b`, labels of the records without a counterpart.
    """
    pairs = []
    for pair, p in zip(comparison.pairs, comparison.adjusted, strict=True):
        lists: dict[str, Any] = {"attacks": list(pair.attacks), "flags_a": list(pair.flags_a), "flags_b": list(pair.flags_b)}
        shares = {"robust_a": pair.robust_a, "robust_b": pair.robust_b, "difference": pair.difference}
        lists["stages"] = [asdict(stage) for stage in pair.stages]
        pairs.append({**asdict(pair), **lists, **shares, "p_holm": p})
    return {
        "a": str(comparison.a),
        "b": str(comparison.b),
        "tests": comparison.tests,
        "pairs": pairs,
        "only_in_a": [label(record) for record in comparison.only_in_a],
        "only_in_b": [label(record) for record in comparison.only_in_b],
    }


def comparison_table(comparison: Comparison) -> Group:
    """The comparison as one table per model and threat, followed by an explanation of the columns and the number of tests.

    Where several attacks were run, the last row of a table is the worst case over them.
    """
    groups: dict[tuple[str | None, ...], list[tuple[Pair, float]]] = {}
    for pair, p in zip(comparison.pairs, comparison.adjusted, strict=True):
        group = (pair.model_a, pair.defence_a, pair.model_b, pair.defence_b, pair.threat)
        # The worst case over a single attack is that attack.
        groups.setdefault(group, []).extend([] if pair.worst_case and len(pair.attacks) == 1 else [(pair, p)])
    several = len({pair.seed for pair in comparison.pairs if not pair.worst_case}) > 1
    parts: list[RenderableType] = [Text(f"A: {comparison.a}\nB: {comparison.b}\n")]
    for rows in groups.values():
        parts += _of_group(rows, several)
    parts.append(
        Text(
            "A, B: robust accuracy, an upper bound on robustness; only A, only B: images that are robust in that run alone. "
            "B − A: 95 % score interval of the difference over the choice of images, in percentage points. p: McNemar's exact "
            "test of one pair alone. "
            f"{_tests(comparison.tests)}"
        )
    )
    for name, records in (("A", comparison.only_in_a), ("B", comparison.only_in_b)):
        parts += [Text(f"only in {name}, not compared: {label(record)}") for record in records]
    return Group(*parts)


def _tests(number: int) -> str:
    if number == 1:
        return "One test was made, so Holm's p is the same."
    return f"{number:,} tests were made, and the smallest p of many is small by chance: read Holm's, adjusted for all tests."


def _of_group(rows: Sequence[tuple[Pair, float]], several_seeds: bool) -> list[RenderableType]:
    # Text, not str: rich would parse [brackets] and :words: in names as markup.
    first = rows[0][0]
    view = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    view.add_column("attack", overflow="fold")
    for name in ("A", "B", "B − A", "only A", "only B", "p", "Holm"):
        view.add_column(name, justify="right", no_wrap=True)
    lines: list[Text] = []
    for pair, adjusted in rows:
        name = _name(pair, several_seeds)
        view.add_row(*_row(name, pair, adjusted))
        lines += _stages(name, pair)
        for run, flags in (("A", pair.flags_a), ("B", pair.flags_b)):
            if flags and not pair.worst_case:
                lines.append(Text.assemble((f"! {', '.join(flags)}", "bold red"), f" in {run} ({name}, {pair.threat})"))
    model_a = model_under_test_name(first.model_a, first.defence_a)
    model_b = model_under_test_name(first.model_b, first.defence_b)
    title = model_a if model_a == model_b else f"{model_a} → {model_b}"
    return [Text.assemble((title, "bold"), f", {first.threat}: {first.n:,} images of {first.data}"), view, *lines]


def _stages(name: str, pair: Pair) -> list[Text]:
    """The images that each stage solved in A and in B, where the attack has stages of its own."""
    if {stage.name for stage in pair.stages} <= COMMON_STAGES:
        return []
    parts = [f"{stage.name} {stage.a:,} / {stage.b:,} ({stage.both:,} in both)" for stage in pair.stages if stage.a + stage.b]
    return [Text(f"solved by stage, A / B ({name}): {', '.join(parts)}")]


def _name(pair: Pair, several_seeds: bool) -> str:
    if pair.attack is None:
        return "worst case"
    goal = "" if pair.goal == UNTARGETED else f" → {pair.goal}"
    # A space after each comma, so that a narrow terminal wraps there and not inside a number.
    return pair.attack.replace(",", ", ") + goal + (f", seed {pair.seed}" if several_seeds else "")


def _row(name: str, pair: Pair, adjusted: float) -> tuple[Text, ...]:
    style = "bold" if pair.worst_case else ""
    flagged = (" !", "bold red") if pair.flags_a or pair.flags_b else ""
    return (
        Text.assemble((name, style), flagged),
        Text(f"{pair.robust_a:.1%}", style),
        Text(f"{pair.robust_b:.1%}", style),
        Text(f"{100 * pair.low:+.1f} to {100 * pair.high:+.1f}", "dim"),
        Text(f"{pair.only_a:,}"),
        Text(f"{pair.only_b:,}"),
        Text(_p(pair.p), "dim"),
        Text(_p(adjusted), "bold" if adjusted < _LEVEL else ""),
    )


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.0001 else "<0.0001"
