"""Diagnostics of a run: gradient masking and other reasons not to believe its number, as flags and notes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, final

from scipy.stats import beta, binom

from robustkit._engine.ledger import Check, Message, sum_checks

__all__ = ["FLAGS", "LEVEL", "NOTES", "DiagnosticRule", "flags_and_notes", "lower_bound", "p_value"]

LEVEL: Final = 0.05  # the probability that a sound model raises any flag at all


@final
@dataclass(frozen=True)
class DiagnosticRule:
    """How the outcome of a check is reported.

    Attributes:
        name: Name of the check, and of its flag or note.
        finding: One line, with {hits}, {of} and {limit} for the numbers.
        advice: What the finding means, or what to do.
        min_cases: For a note, the number of cases below which it is not reported.
    """

    name: str
    finding: str
    advice: str
    min_cases: int = 1

    def message(self, check: Check) -> Message:
        """The flag or note, with the reason in one line."""
        finding = self.finding.format(hits=check.hits, of=check.of, limit=check.limit)
        return Message(self.name, f"{finding}; {self.advice}")


# A flag is raised by an exact binomial test of the share of hits against the largest share that a sound model would show.
FLAGS: Final = (
    DiagnosticRule(
        "gradient-free-breaks",
        "attacks without gradients broke {hits} of {of} examples that gradient attacks had not broken",
        "the gradients are misleading",
    ),
    DiagnosticRule(
        "transfer-breaks",
        "adversarial examples of a substitute model broke {hits} of {of} examples that gradient attacks had not broken",
        "the gradients are misleading",
    ),
    DiagnosticRule(
        "gradients-disagree",
        "on {hits} of {of} examples the gradient does not predict how the loss changes within the budget",
        "the gradients are misleading",
    ),
    DiagnosticRule(
        "faint-gradients",
        "{hits} of {of} gradients are less than a hundredth of the change of the loss within the budget",
        "they are lost to rounding",
    ),
    DiagnosticRule(
        "small-steps-disagree",
        "on {hits} of {of} examples the gradient is not the derivative, in float64 and at small steps",
        "something cuts or replaces the graph",
    ),
    DiagnosticRule(
        "more-steps-leave-more",
        "of {of} examples whose outcome changed with four times the steps, {hits} became robust",
        "the steps lead away from adversarial examples",
    ),
    DiagnosticRule(
        "more-restarts-leave-more",
        "of {of} examples whose outcome changed with more restarts, {hits} became robust",
        "the model's outputs are not repeatable",
    ),
    DiagnosticRule(
        "larger-eps-leaves-more",
        "of {of} examples whose outcome changed with twice the budget, {hits} became robust",
        "the attack misses adversarial examples that exist",
    ),
    DiagnosticRule(
        "unbounded-leaves-robust",
        "{hits} of {of} examples are robust to an attack with an unbounded budget",
        "no model can be: the attack does not work on this one",
    ),
    DiagnosticRule(
        "binarisation-missed",
        "on {hits} of {of} examples the attack missed an adversarial example that exists by construction",
        "the attack is too weak for these features",
    ),
    DiagnosticRule(
        "unsteady-answers",
        "{hits} of {of} outputs were different when the query was repeated",
        "declare Target(stochastic=True)",
    ),
    DiagnosticRule(
        "batch-dependent",
        "{hits} of {of} outputs were different in another batch",
        "the output for an example must not depend on the rest of its batch (batch norm in training mode?)",
    ),
    DiagnosticRule(
        "saturated-outputs",
        "{hits} of {of} outputs do not distinguish any classes but the first",
        "rounded or huge outputs hide the gradient; attack the logits before them",
    ),
    DiagnosticRule("undefined-outputs", "{hits} of {of} outputs hold NaN or an infinity", "they count as wrong"),
    DiagnosticRule(
        "tied-outputs",
        "{hits} of {of} final outputs have two classes tied for the first place",
        "they are right only by the order of the classes",
    ),
    DiagnosticRule("broken-autograd", "{hits} of {of} gradient queries raised an error in autograd", "they count as zero"),
)

NOTES: Final = (
    DiagnosticRule(
        "boundary-breaks",
        "in {hits} of {of} batches boundary walks broke more than 1 % of the examples that gradient descent had not broken",
        "the loss is flat around the inputs; longer walks were run",
    ),
    DiagnosticRule(
        "probabilities",
        "{hits} of {of} outputs are probabilities, not logits",
        "their differences vanish in float32; pass the model without its softmax",
    ),
    DiagnosticRule(
        "unusual-range",
        "{hits} of {of} batches or inputs look normalised, by their bounds or by their values",
        "eps is in the units of these inputs; normalisation belongs in the model",
    ),
    DiagnosticRule(
        "view-misleads",
        "{hits} of {of} points that fool the differentiated view do not fool the model",
        "another view may work better",
    ),
    DiagnosticRule(
        "unseeded-noise",
        "{hits} of {of} outputs of a stochastic model were different with the same seed",
        "the run cannot be repeated exactly",
    ),
    DiagnosticRule(
        "plateau",
        "a restart with half the step size came clearly closer to the decision boundary on {hits} of {of} examples",
        "more steps may still help",
        min_cases=5,
    ),
)


def p_value(check: Check) -> float:
    """The probability of at least this many hits if their share is `limit`: exact binomial, one-sided."""
    return float(binom.sf(check.hits - 1, check.of, check.limit)) if check.of else 1.0


def lower_bound(hits: int, of: int, level: float = LEVEL) -> float:
    """The exact one-sided lower confidence bound of a share (Clopper & Pearson 1934)."""
    return float(beta.ppf(level, hits, of - hits + 1)) if hits else 0.0


def flags_and_notes(checks: Iterable[Check]) -> tuple[list[Message], list[Message]]:
    """The flags and notes that follow from the checks, which are summed by name.

    A flag is raised where the share of hits is too large for a sound model, by an exact one-sided binomial test; Holm's
    correction over all tests keeps the probability of any false flag at 5 %. A note is reported where more than half of
    the cases are hits and there are at least `min_cases`.
    """
    sums = {check.name: check for check in sum_checks(checks)}
    flags = _holm([(rule, sums[rule.name]) for rule in FLAGS if rule.name in sums])
    notes = [(rule, sums[rule.name]) for rule in NOTES if rule.name in sums]
    return flags, [rule.message(check) for rule, check in notes if 2 * check.hits > check.of >= rule.min_cases]


def _holm(tests: Sequence[tuple[DiagnosticRule, Check]]) -> list[Message]:
    """The messages of the rejected hypotheses by Holm's step-down procedure (Holm 1979), in the order of `FLAGS`."""
    order = sorted(tests, key=lambda test: p_value(test[1]))
    rejected = []
    for rank, (rule, check) in enumerate(order):
        if p_value(check) > LEVEL / (len(order) - rank):
            break
        rejected.append((FLAGS.index(rule), rule.message(check)))
    return [message for _, message in sorted(rejected, key=lambda item: item[0])]
