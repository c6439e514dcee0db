"""The same attack through every installed library: are the images the same, and where not, is it meant?"""

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
from scipy.stats import binomtest
from torch import Tensor, nn

from robustkit._engine.state_guard import fork_rng
from robustkit._engine.tensors import abs_max
from robustkit.errors import ArgumentError, MissingExtraError
from robustkit.goals import ClassifyAs, Misclassify, least_likely
from robustkit.interop.crosscheck.cases import MARGIN, PEERS, Case, cases
from robustkit.interop.peers import restore_gradients
from robustkit.target import Target
from robustkit.threats import L2, Linf

__all__ = ["DIFFERENCES", "Difference", "Row", "crosscheck", "peers", "table"]

TOLERANCE = 1e-6  # in input units: some float32 roundings over 40 steps
# Of the examples that have to lie within it: where a path crosses a kink of the loss, roundings grow. Our order of
# operations is foolbox's; on 256 images foolbox parts from ART, and from torchattacks, on up to 1.6 %.
SHARE = {"foolbox": 0.99, "art": 0.98, "torchattacks": 0.98}
LEVEL = 0.001  # below this p-value, two success rates are not the same

Verdict = Literal["equal", "close", "same rate", "by design", "differs"]


@final
@dataclass(frozen=True)
class Difference:
    """Something that a library does otherwise on purpose, or by a mistake that is known.

    Attributes:
        library: "foolbox", "art" or "torchattacks".
        attack: The compared attack that it shows in, by its name in the table; "" where none of them shows it.
        threat: "linf", "l2", "l1" or "" for all.
        why: One sentence.
        rounding: Whether only roundings differ, so that the images still have to be close.
    """

    library: str
    attack: str
    threat: str
    why: str
    rounding: bool = False


EDGE = "PGD at the edge of the box"

DIFFERENCES = (
    Difference("art", EDGE, "l2", "cuts to the box before the ball instead of after it, so near the edge the paths part"),
    Difference("torchattacks", "PGD, random start", "l2", "starts at a uniform radius, not uniformly in the ball"),
    Difference(
        "torchattacks", "BIM", "linf", "compares with x - eps and x + eps instead of clipping the change", rounding=True
    ),
    Difference("foolbox", "", "linf", "refuses targeted FGSM; one step of its BIM stands in for it"),
    Difference("foolbox", "", "linf", "its MIFGSM adds up signs instead of gradients of unit length"),
    Difference("foolbox", "", "l2", "spends nothing elsewhere of what the box cuts off a single step; our FGSM does"),
    Difference("foolbox", "", "l1", "steps along the whole gradient and shrinks; we move the largest entries and project"),
    Difference("art", "", "l1", "one step moves a single coordinate"),
    Difference("foolbox", "", "", "its Carlini-Wagner and EAD attacks return black images where they fail, as successes"),
    Difference("foolbox", "", "", "its Adam variants of the L1 and L2 basic iterative attacks are the plain ones"),
    Difference("foolbox", "", "", "its DeepFool follows the predicted class, and looks at no wanted class"),
    Difference("foolbox", "", "", "its l0 counts values; our Pixels counts locations"),
    Difference(
        "torchattacks",
        "",
        "",
        "differentiates the mean over the batch, and adds 1e-10 to its length for L2; compared with 1e-30",
    ),
    Difference("art", "", "", "differentiates the mean over the batch and adds 1e-7 to its length; compared with the sum"),
)


@final
@dataclass(frozen=True)
class Row:
    """One attack through one library and through this package, on the same images with the same step size.

    Attributes:
        library: Whom we are compared with.
        attack: Name of the attack.
        threat: The budget, as "linf:0.1".
        n: Number of examples.
        ours: Our success rate.
        theirs: Their success rate, judged by us on their images.
        only_ours: Examples on which we alone succeed.
        only_theirs: Examples on which they alone succeed.
        p_value: How likely so lopsided a split of these is by chance (exact McNemar test).
        largest: The largest difference between the images, in input units.
        differing: The examples whose images differ, by their index: at all for Linf without a random start, by more
            than a millionth otherwise; empty where the starts are random.
        verdict: "equal" bit for bit; "close": all but 1 % (foolbox; others 2 %) within a millionth and equal
            success on those, which is enough
            for L2, momentum and known roundings; "same rate" for random starts; "by design": none of these, for a known
            `reason`; "differs": none of these, and nobody knows why.
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
    largest: float
    differing: tuple[int, ...]
    verdict: Verdict
    reason: str

    @property
    def ok(self) -> bool:
        """Whether the two agree, or are known not to."""
        return self.verdict != "differs"


def peers() -> dict[str, str | None]:
    """The libraries that can be compared with: name -> version, None where it cannot be imported here."""
    found: dict[str, str | None] = {}
    for name, (_, load, distribution) in PEERS.items():
        try:
            load()
            found[name] = version(distribution)
        except (MissingExtraError, ArgumentError):
            found[name] = None
    return found


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
    """The agreement with every installed library, one row for each library, attack and budget.

    All examples go through the model at once, in both libraries, so that the same kernels run and equal means equal bit
    for bit. At the edge of the box L2 attacks differ by design, so those of a budget below 0.3 run on 0.3 + 0.4 x too.

    Args:
        model: A classifier, (N, *S) in [0, 1] -> logits (N, C).
        x: Images in [0, 1], (N, *S).
        y: Their classes, (N,) int64.
        eps: Budgets of the Linf attacks.
        eps_l2: Budgets of the L2 attacks.
        libraries: Names from `peers()`; default all that are installed.
        seed: Of the random starts.

    Raises:
        ArgumentError: A library that is not installed, or inputs that no attack would take.
    """
    chosen = _chosen(libraries)
    if not len(x):
        raise ArgumentError("x is empty; there is nothing to compare: give at least one image")
    target = Target(model, batch_size=len(x))
    inner, wanted = MARGIN + (1 - 2 * MARGIN) * x, least_likely(model, x, batch_size=len(x))
    rows = []
    for case in (case for threat in (*map(Linf, eps), *map(L2, eps_l2)) for case in cases(threat)):
        goal, ref = (ClassifyAs(), wanted) if case.targeted else (Misclassify(), y)
        at = inner if case.interior else x
        ours = case.ours(target, at, ref, goal=goal, threat=case.threat, seed=seed, keep="last").x_adv
        for library in chosen:
            with target.frozen(), restore_gradients(model), fork_rng(seed):
                theirs = PEERS[library][0](case, model, at.clone(), ref)
                if theirs is not None:
                    rows.append(_row(library, case, ours, theirs.detach(), _won(model, goal, (ours, theirs), ref)))
    return rows


def _chosen(libraries: Sequence[str] | None) -> list[str]:
    installed = [name for name, found in peers().items() if found is not None]
    missing = [name for name in libraries or () if name not in installed]
    if missing:
        raise ArgumentError(f"libraries={list(libraries or ())!r}: {missing[0]!r} is not among those installed, {installed}")
    return installed if libraries is None else list(libraries)


@torch.no_grad()
def _won(model: nn.Module, goal: Misclassify | ClassifyAs, images: Sequence[Tensor], ref: Tensor) -> list[Tensor]:
    return [goal.success(model(x_adv), ref) for x_adv in images]


def _row(library: str, case: Case, ours: Tensor, theirs: Tensor, won: Sequence[Tensor]) -> Row:
    only_ours, only_theirs = int((won[0] & ~won[1]).sum()), int((won[1] & ~won[0]).sum())
    p_value = float(binomtest(only_ours, only_ours + only_theirs).pvalue) if only_ours + only_theirs else 1.0
    threat = "linf" if case.linf else "l2"
    known = next((d for d in DIFFERENCES if (d.library, d.attack, d.threat) == (library, case.name, threat)), None)
    exact = case.linf and case.name != "MIFGSM" and not (known and known.rounding)
    apart = abs_max(ours.double() - theirs.double())
    differing = (apart > (0 if exact else TOLERANCE)).nonzero().squeeze(1).tolist()
    if case.random_start:
        verdict: Verdict = "same rate" if p_value >= LEVEL else "differs"
    elif not bool((apart > 0).any()):
        verdict = "equal"
    else:
        near = (
            not exact
            and len(differing) <= (1 - SHARE[library]) * len(ours)
            and torch.equal(won[0][differing], won[1][differing])
        )
        verdict = "close" if near else "differs"
    if verdict == "differs" and known and not known.rounding:
        verdict = "by design"
    return Row(
        library,
        case.name,
        f"{threat}:{case.eps:.3g}",
        len(ours),
        float(won[0].double().mean()),
        float(won[1].double().mean()),
        only_ours,
        only_theirs,
        p_value,
        float(apart.max()),
        () if case.random_start else tuple(differing),
        verdict,
        known.why if known and verdict in ("close", "by design") else "",
    )


def table(rows: Sequence[Row]) -> Group:
    """The rows to be printed: a line for each attack and budget, a column for each library, the known reasons below."""
    libraries = list(dict.fromkeys(row.library for row in rows))
    title = f"The same attack here and elsewhere, {rows[0].n:,} images" if rows else "No library to compare with"
    shown = Table(title=title, box=box.SIMPLE, padding=(0, 1), title_justify="left")
    for name, align in (("attack", "left"), ("threat", "left"), ("ours", "right"), *((name, "left") for name in libraries)):
        shown.add_column(name, justify="right" if align == "right" else "left", no_wrap=name == "threat", overflow="fold")
    reasons = list(dict.fromkeys((row.library, row.attack, row.reason) for row in rows if row.reason))
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        lines.setdefault((row.attack, row.threat), []).append(row)
    for (attack, threat), line in lines.items():
        cells = [" ".join(_cell(row, reasons) for row in line if row.library == library) for library in libraries]
        shown.add_row(attack, threat, f"{line[0].ours:.1%}", *cells)
    told = [f"[{i}] {library}, {attack}: {why}" for i, (library, attack, why) in enumerate(reasons, 1)]
    agree = (
        f"{sum(row.ok for row in rows)} of {len(rows)} agree or are known not to. ours: share of images on which we succeed."
    )
    signs = "equal: bit for bit; close: rounding; same rate a/b: random starts, a only we solve, b only they solve."
    return Group(shown, *(Text(line) for line in (*told, f"{agree} {signs}")))


def _cell(row: Row, reasons: Sequence[tuple[str, str, str]]) -> str:
    """The verdict, with what qualifies it: lopsided successes, images that differ, the number of a reason."""
    split = f" {row.only_ours}/{row.only_theirs}" if row.verdict in ("same rate", "differs") else ""
    count = f", {len(row.differing)} images" if row.differing else ""
    note = f" \\[{reasons.index((row.library, row.attack, row.reason)) + 1}]" if row.reason else ""
    text = f"{row.verdict}{split}{count}{note}"
    return text if row.ok else f"[bold red]{text}[/]"
