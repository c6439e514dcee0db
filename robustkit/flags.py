"""MAY THIS NUMBER BE BELIEVED? What the checks of a run have seen, and when it is an alarm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, final

from scipy.stats import beta, binom

from robustkit._engine.ledger import Check, Message, sum_checks

__all__ = ["FLAGS", "LEVEL", "NOTES", "DiagnosticRule", "flags_and_notes", "lower_bound", "p_value"]

LEVEL: Final = 0.05  # the chance that a sound model raises any flag at all


@final
@dataclass(frozen=True)
class DiagnosticRule:
    """What a piece of evidence is about.

    Attributes:
        name: Of the evidence, and of the flag or note.
        seen: One line, with {hits}, {of} and {limit} for the numbers.
        advice: What it means, or what to do.
        least: Cases, for a note: of fewer a share says nothing.
    """

    name: str
    seen: str
    advice: str
    least: int = 1

    def message(self, one: Check) -> Message:
        """The evidence in one line."""
        return Message(self.name, f"{self.seen.format(hits=one.hits, of=one.of, limit=one.limit)}; {self.advice}")


# Every alarm is an exact binomial test of one share against the most that a sound model would show.
FLAGS: Final = (
    DiagnosticRule(
        "gradient-free-breaks",
        "attacks without gradients broke {hits} of {of} examples that withstood the gradients",
        "the gradients mislead",
    ),
    DiagnosticRule(
        "transfer-breaks",
        "examples made for a copy of the model broke {hits} of {of} that withstood the gradients",
        "the gradients mislead",
    ),
    DiagnosticRule(
        "gradients-disagree",
        "on {hits} of {of} images the gradient does not tell how the loss changes within the budget",
        "the gradients mislead",
    ),
    DiagnosticRule(
        "faint-gradients",
        "{hits} of {of} gradients are less than a hundredth of how the loss changes within the budget",
        "they are lost in rounding",
    ),
    DiagnosticRule(
        "small-steps-disagree",
        "on {hits} of {of} images the gradient is not the derivative, in float64 and at small steps",
        "something cuts or replaces the graph",
    ),
    DiagnosticRule(
        "more-steps-leave-more",
        "of {of} examples that four times the steps decided otherwise, {hits} became robust",
        "steps lead astray",
    ),
    DiagnosticRule(
        "more-restarts-leave-more",
        "of {of} examples that more restarts decided otherwise, {hits} became robust",
        "the model's answers are not steady",
    ),
    DiagnosticRule(
        "larger-eps-leaves-more",
        "of {of} examples that twice the budget decided otherwise, {hits} became robust",
        "the attack does not find what is there",
    ),
    DiagnosticRule(
        "unbounded-leaves-robust",
        "{hits} of {of} examples withstand an attack without any budget",
        "no model can: the attack does not work on this one",
    ),
    DiagnosticRule(
        "binarisation-missed",
        "on {hits} of {of} examples the attack missed a point that is there by construction",
        "it is too weak for these features",
    ),
    DiagnosticRule(
        "unsteady-answers", "{hits} of {of} rows were answered otherwise when asked again", "declare Target(stochastic=True)"
    ),
    DiagnosticRule(
        "batch-dependent",
        "{hits} of {of} rows were answered otherwise in other company",
        "an example's answer must depend on itself alone (batch norm in training mode?)",
    ),
    DiagnosticRule(
        "saturated-outputs",
        "{hits} of {of} answers leave no difference between any but the first class",
        "rounded or huge outputs hide the gradient; attack the logits before them",
    ),
    DiagnosticRule("undefined-outputs", "{hits} of {of} answers hold NaN or an infinity", "they count as wrong"),
    DiagnosticRule(
        "tied-outputs",
        "{hits} of {of} final answers give the first place to two classes",
        "right by the order of the classes alone",
    ),
    DiagnosticRule("broken-autograd", "{hits} of {of} gradient queries ended in an error of autograd", "they count as zero"),
)

NOTES: Final = (
    DiagnosticRule(
        "boundary-breaks",
        "in {hits} of {of} batches walks along the border broke more than 1 % of what descents had left",
        "the model is flat around its inputs; longer walks were made",
    ),
    DiagnosticRule(
        "probabilities",
        "{hits} of {of} answers are probabilities, not logits",
        "their differences fade in float32; give the model without its softmax",
    ),
    DiagnosticRule(
        "unusual-range",
        "{hits} of {of} look normalised, by the bounds or by the values of the inputs",
        "eps is in the units of these inputs; normalisation belongs in the model",
    ),
    DiagnosticRule(
        "view-misleads",
        "{hits} of {of} points that fool the view which is followed do not fool the model",
        "another view may serve better",
    ),
    DiagnosticRule(
        "unseeded-noise",
        "{hits} of {of} rows of a random model were answered otherwise with the same seed",
        "the run cannot be repeated to the last digit",
    ),
    DiagnosticRule(
        "plateau",
        "a restart with half the step got markedly closer on {hits} of {of} examples",
        "more steps may still help",
        least=5,
    ),
)


def p_value(one: Check) -> float:
    """The chance of at least so many hits where their share is `limit`: exact, one-sided."""
    return float(binom.sf(one.hits - 1, one.of, one.limit)) if one.of else 1.0


def lower_bound(hits: int, of: int, level: float = LEVEL) -> float:
    """The exact one-sided lower bound of a share (Clopper & Pearson 1934)."""
    return float(beta.ppf(level, hits, of - hits + 1)) if hits else 0.0


def flags_and_notes(checks: Iterable[Check]) -> tuple[list[Message], list[Message]]:
    """The flags and the notes that follow from the evidence, summed by name.

    A flag is raised where the share of hits is too large for a sound model, by an exact one-sided binomial test; Holm's
    correction over all of them keeps the chance of any false alarm at 5 %. A note is told where most cases were hits, of cases
    enough.
    """
    sums = {one.name: one for one in sum_checks(checks)}
    flags = _holm([(sign, sums[sign.name]) for sign in FLAGS if sign.name in sums])
    notes = [(sign, sums[sign.name]) for sign in NOTES if sign.name in sums]
    return flags, [sign.message(one) for sign, one in notes if 2 * one.hits > one.of >= sign.least]


def _holm(tests: Sequence[tuple[DiagnosticRule, Check]]) -> list[Message]:
    """The remarks of those that are rejected, in the order of the table (Holm 1979)."""
    order = sorted(tests, key=lambda test: p_value(test[1]))
    alarms = []
    for rank, (sign, one) in enumerate(order):
        if p_value(one) > LEVEL / (len(order) - rank):
            break
        alarms.append((FLAGS.index(sign), sign.message(one)))
    return [message for _, message in sorted(alarms, key=lambda alarm: alarm[0])]
