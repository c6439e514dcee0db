"""Run the same attack in every installed library and compare the adversarial images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal, final

import torch
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from robustkit._engine.state_guard import fork_rng
from robustkit._engine.tensors import abs_max
from robustkit.errors import ArgumentError, MissingExtraError
from robustkit.goals import ClassifyAs, Misclassify, least_likely
from robustkit.interop.crosscheck.cases import LIBRARIES, MARGIN, Case, cases
from robustkit.interop.crosscheck.paired_test import LEVEL, mcnemar_p_value
from robustkit.interop.peers import restore_gradients
from robustkit.target import Target
from robustkit.threats import L2, Linf

__all__ = ["DIFFERENCES", "Difference", "Row", "comparison_table", "crosscheck", "library_versions"]

TOLERANCE = 1e-6  # in input units: some float32 rounding errors over 40 steps
# The share of examples that must be within the tolerance: where a path crosses a kink of the loss, rounding errors grow. Our
# order of operations is foolbox's; on 256 images, foolbox differs from ART and from torchattacks on up to 1.6 %.
MIN_SHARE_CLOSE = {"foolbox": 0.99, "art": 0.98, "torchattacks": 0.98}

Verdict = Literal["equal", "close", "same rate", "by design", "differs"]


@final
@dataclass(frozen=True)
class Difference:
    """A known difference of a library from ours, by design or by a mistake of that library.

    Attributes:
        library: "foolbox", "art" or "torchattacks".
        attack: Name of the compared attack that it affects; "" if it affects none of them.
        threat: "linf", "l2", "l1", or "" for all.
        why: The difference in one sentence.
        rounding: Whether only rounding differs, so that the images must still be close.
    """

    library: str
    attack: str
    threat: str
    why: str
    rounding: bool = False


EDGE = "PGD at the edge of the box"

DIFFERENCES = (
    Difference(
        "art", EDGE, "l2", "clamps to the box before it projects onto the ball instead of after, so paths differ near the edge"
    ),
    Difference("torchattacks", "PGD, random start", "l2", "starts at a uniform radius, not uniformly in the ball"),
    Difference(
        "torchattacks", "BIM", "linf", "clamps to [x - eps, x + eps] instead of clamping the perturbation", rounding=True
    ),
    Difference("foolbox", "", "linf", "refuses targeted FGSM; compared with one step of its BIM"),
    Difference("foolbox", "", "linf", "its MIFGSM accumulates gradient signs instead of gradients of unit norm"),
    Difference("foolbox", "", "l2", "does not redistribute what the box cuts off a single step; our FGSM does"),
    Difference("foolbox", "", "l1", "steps along the whole gradient and rescales; we move the largest entries and project"),
    Difference("art", "", "l1", "one step moves a single coordinate"),
    Difference("foolbox", "", "", "its Carlini-Wagner and EAD attacks return black images as successes where they fail"),
    Difference("foolbox", "", "", "its Adam variants of the L1 and L2 basic iterative attacks do not use Adam"),
    Difference("foolbox", "", "", "its DeepFool starts from the predicted class and supports no target class"),
    Difference("foolbox", "", "", "its l0 counts values; our Pixels counts locations"),
    Difference(
        "torchattacks",
        "",
        "",
        "differentiates the batch mean and adds 1e-10 to the gradient norm in L2; compared with 1e-30",
    ),
    Difference("art", "", "", "differentiates the batch mean and adds 1e-7 to the gradient norm; compared with the sum"),
)


@final
@dataclass(frozen=True)
class Row:
    """One attack in one library and in this package, on the same images with the same step size.

    Attributes:
        library: Name of the other library.
        attack: Name of the attack.
        threat: The threat, such as "linf:0.1".
        n: Number of examples.
        ours: Our success rate.
        theirs: Their success rate, judged by us on their images.
        only_ours: Number of examples that only our attack solves.
        only_theirs: Number of examples that only their attack solves.
        p_value: Two-sided p-value of the exact McNemar test on these two.
        max_difference: The largest difference between the images, in input units.
        differing: Indices of the examples whose images differ: at all for Linf without a random start, by more than
            1e-6 otherwise; empty for random starts.
        verdict: "equal": bit for bit. "close" (for L2, momentum and known rounding): at most 1 % of the images (foolbox;
            others 2 %) differ by more than 1e-6, with equal success on those. "same rate": for random starts, no
            significant difference in success. "by design": none of these, for a known `reason`. "differs": none of
            these, without a known reason.
        reason: Why the images are known to differ, or "".
    """

    library: str
    attack: str
    threat: str
    n: int
    ours: float
    theirs: float
    only_ours: int
    only_theirs: int
    p_value: float
    max_difference: float
    differing: tuple[int, ...]
    verdict: Verdict
    reason: str

    @property
    def ok(self) -> bool:
        """Whether the two agree, or differ for a known reason."""
        return self.verdict != "differs"


def library_versions() -> dict[str, str | None]:
    """Return the version of each library that we compare with, None if it cannot be imported."""
    versions: dict[str, str | None] = {}
    for name, (_, load, distribution) in LIBRARIES.items():
        try:
            load()
            versions[name] = version(distribution)
        except (MissingExtraError, ArgumentError):
            versions[name] = None
    return versions


def crosscheck(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: Sequence[float] = (1 / 255, 8 / 255, 0.1, 0.3),
    eps_l2: Sequence[float] = (0.1, 0.25, 1.0),
    libraries: Sequence[str] | None = None,
    seed: int = 0,
) -> list[Row]:
    """Compare our attacks with every installed library; one row for each library, attack and threat.

    All examples are one batch in both libraries, so that the same kernels run and results can be equal bit for bit. At the
    edge of the box L2 attacks differ by design; with eps below 0.3 they also run on 0.3 + 0.4 x, which stays inside.

    Args:
        model: A classifier, (N, *S) in [0, 1] -> logits (N, C).
        x: Images in [0, 1], (N, *S).
        y: True classes, (N,) int64.
        eps: Values of eps for the Linf attacks.
        eps_l2: Values of eps for the L2 attacks.
        libraries: Names from `library_versions()`; default all that are installed.
        seed: Seed of the random starts.

    Raises:
        ArgumentError: A library is not installed, or the inputs are invalid.
    """
    selected = _select_libraries(libraries)
    if not len(x):
        raise ArgumentError("x is empty; give at least one image to compare")
    target = Target(model, batch_size=len(x))
    interior_x, target_classes = MARGIN + (1 - 2 * MARGIN) * x, least_likely(model, x, batch_size=len(x))
    rows = []
    for case in (case for threat in (*map(Linf, eps), *map(L2, eps_l2)) for case in cases(threat)):
        goal, ref = (ClassifyAs(), target_classes) if case.targeted else (Misclassify(), y)
        x_start = interior_x if case.interior else x
        ours = case.ours(target, x_start, ref, goal=goal, threat=case.threat, seed=seed, keep="last").x_adv
        for library in selected:
            with target.frozen(), restore_gradients(model), fork_rng(seed):
                theirs = LIBRARIES[library][0](case, model, x_start.clone(), ref)
                if theirs is not None:
                    success = _success(model, goal, (ours, theirs), ref)
                    rows.append(_row(library, case, ours, theirs.detach(), success))
    return rows


def _select_libraries(libraries: Sequence[str] | None) -> list[str]:
    installed = [name for name, installed_version in library_versions().items() if installed_version is not None]
    missing = [name for name in libraries or () if name not in installed]
    if missing:
        raise ArgumentError(
            f"libraries={list(libraries or ())!r}: {missing[0]!r} is not among the installed libraries, {installed}; install "
            "it or leave it out"
        )
    return installed if libraries is None else list(libraries)


@torch.no_grad()
def _success(model: nn.Module, goal: Misclassify | ClassifyAs, images: Sequence[Tensor], ref: Tensor) -> list[Tensor]:
    return [goal.success(model(x_adv), ref) for x_adv in images]


def _row(library: str, case: Case, ours: Tensor, theirs: Tensor, success: Sequence[Tensor]) -> Row:
    only_ours, only_theirs = int((success[0] & ~success[1]).sum()), int((success[1] & ~success[0]).sum())
    p_value = mcnemar_p_value(only_ours, only_theirs)
    threat = "linf" if case.linf else "l2"
    known = next((d for d in DIFFERENCES if (d.library, d.attack, d.threat) == (library, case.name, threat)), None)
    exact = case.linf and case.name != "MIFGSM" and not (known and known.rounding)
    distance = abs_max(ours.double() - theirs.double())
    differing = (distance > (0 if exact else TOLERANCE)).nonzero().squeeze(1).tolist()
    if case.random_start:
        verdict: Verdict = "same rate" if p_value >= LEVEL else "differs"
    elif not bool((distance > 0).any()):
        verdict = "equal"
    else:
        close = (
            not exact
            and len(differing) <= (1 - MIN_SHARE_CLOSE[library]) * len(ours)
            and torch.equal(success[0][differing], success[1][differing])
        )
        verdict = "close" if close else "differs"
    if verdict == "differs" and known and not known.rounding:
        verdict = "by design"
    return Row(
        library,
        case.name,
        f"{threat}:{case.eps:.3g}",
        len(ours),
        float(success[0].double().mean()),
        float(success[1].double().mean()),
        only_ours,
        only_theirs,
        p_value,
        float(distance.max()),
        () if case.random_start else tuple(differing),
        verdict,
        known.why if known and verdict in ("close", "by design") else "",
    )


def comparison_table(rows: Sequence[Row]) -> Group:
    """Format the rows for printing: a line per attack and threat, a column per library, known reasons below."""
    libraries = list(dict.fromkeys(row.library for row in rows))
    title = f"Our attacks and those of other libraries, {rows[0].n:,} images" if rows else "No library to compare with"
    columns = Table(title=title, box=box.SIMPLE, padding=(0, 1), title_justify="left")
    for name, align in (("attack", "left"), ("threat", "left"), ("ours", "right"), *((name, "left") for name in libraries)):
        columns.add_column(name, justify="right" if align == "right" else "left", no_wrap=name == "threat", overflow="fold")
    reasons = list(dict.fromkeys((row.library, row.attack, row.reason) for row in rows if row.reason))
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        lines.setdefault((row.attack, row.threat), []).append(row)
    for (attack, threat), line in lines.items():
        cells = [" ".join(_cell(row, reasons) for row in line if row.library == library) for library in libraries]
        columns.add_row(attack, threat, f"{line[0].ours:.1%}", *cells)
    footnotes = [f"[{i}] {library}, {attack}: {why}" for i, (library, attack, why) in enumerate(reasons, 1)]
    summary = f"{sum(row.ok for row in rows)} of {len(rows)} agree or differ for a known reason. ours: our success rate."
    legend = "equal: bit for bit; close: rounding; same rate a/b: random starts, a images only we solve, b only they solve."
    return Group(columns, *(Text(line) for line in (*footnotes, f"{summary} {legend}")))


def _cell(row: Row, reasons: Sequence[tuple[str, str, str]]) -> str:
    """Format a verdict with the discordant counts, the number of differing images and the number of its reason."""
    split = f" {row.only_ours}/{row.only_theirs}" if row.verdict in ("same rate", "differs") else ""
    count = f", {len(row.differing)} images" if row.differing else ""
    note = f" \\[{reasons.index((row.library, row.attack, row.reason)) + 1}]" if row.reason else ""
    text = f"{row.verdict}{split}{count}{note}"
    return text if row.ok else f"[bold red]{text}[/]"
