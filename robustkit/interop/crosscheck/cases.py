"""Attacks that several libraries have, and how to run them in each library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustkit.attack import Attack
from robustkit.attacks import FGSM, MIFGSM, PGD
from robustkit.interop._art_estimator import classifier_of
from robustkit.interop.peers import load_art, load_foolbox, load_torchattacks
from robustkit.threats import Linf, Threat

__all__ = ["LIBRARIES", "MARGIN", "Case", "cases"]

MARGIN = 0.3  # distance from the edge of the box, where the libraries differ; smaller perturbations stay inside


@dataclass(frozen=True)
class Case:
    """One attack in one threat.

    Attributes:
        name: Name in reports.
        ours: The attack in this package.
        threat: The threat; images are in [0, 1].
        steps: Number of steps.
        fraction: Step length as a share of eps; exactly the float that the other libraries get.
        random_start: Whether it starts at a random point.
        targeted: Whether the target is the least likely class.
        interior: Whether the images are first moved away from the edge of the box.
    """

    name: str
    ours: Attack
    threat: Threat
    steps: int = 1
    fraction: float = 1.0
    random_start: bool = False
    targeted: bool = False
    interior: bool = False

    @property
    def eps(self) -> float:
        """The eps of the threat."""
        return float(self.threat.eps)

    @property
    def linf(self) -> bool:
        """Whether the threat is Linf."""
        return isinstance(self.threat, Linf)


def cases(threat: Threat) -> list[Case]:
    """Return the attacks that are compared in one threat."""
    bim, pgd = PGD(steps=10, reach=2.0, random_start=False), PGD(random_start=False)
    fraction = pgd.reach / pgd.steps
    if not isinstance(threat, Linf):
        interior_cases = [
            Case("FGM", FGSM(), threat, interior=True),
            Case("BIM", bim, threat, 10, 0.2, interior=True),
            Case("PGD", pgd, threat, 40, fraction, interior=True),
        ]
        return (interior_cases if float(threat.eps) < MARGIN else []) + [
            Case("PGD at the edge of the box", pgd, threat, 40, fraction),
            Case("PGD, random start", PGD(), threat, 40, fraction, random_start=True),
        ]
    return [
        Case("FGSM", FGSM(), threat),
        Case("FGSM, least likely class", FGSM(), threat, targeted=True),
        Case("BIM", bim, threat, 10, 0.2),
        Case("PGD", pgd, threat, 40, fraction),
        Case("PGD, least likely class", pgd, threat, 40, fraction, targeted=True),
        Case("PGD, random start", PGD(), threat, 40, fraction, random_start=True),
        Case("MIFGSM", MIFGSM(), threat, 10, 0.1),
    ]


def _foolbox(case: Case, model: nn.Module, x: Tensor, ref: Tensor) -> Tensor | None:
    if case.name == "MIFGSM":
        return None
    fb = load_foolbox()
    norm = "Linf" if case.linf else "L2"
    kind = "ProjectedGradientDescentAttack" if case.name.startswith("PGD") else "BasicIterativeAttack"
    if case.steps == 1 and not case.targeted:
        attack = getattr(fb.attacks, f"{norm}FastGradientAttack")()
    else:
        attack = getattr(fb.attacks, norm + kind)(rel_stepsize=case.fraction, steps=case.steps, random_start=case.random_start)
    criterion = (fb.criteria.TargetedMisclassification if case.targeted else fb.criteria.Misclassification)(ref)
    x_adv: Tensor = attack.run(fb.PyTorchModel(model, bounds=(0, 1), device=x.device), x, criterion, epsilon=case.eps)
    return x_adv


def _run_art(case: Case, model: nn.Module, x: Tensor, ref: Tensor) -> Tensor | None:
    evasion, _ = load_art()
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    classifier = classifier_of(model, x, classes, (0.0, 1.0))
    common: dict[str, Any] = {"norm": np.inf if case.linf else 2, "eps": case.eps, "targeted": case.targeted}  # mixed types
    common |= {"batch_size": len(x)}
    if case.steps == 1:
        attack = evasion.FastGradientMethod(classifier, **common)
    elif case.name == "MIFGSM":
        attack = evasion.MomentumIterativeMethod(
            classifier, eps_step=case.fraction * case.eps, max_iter=case.steps, verbose=False, **common
        )
    else:
        attack = evasion.ProjectedGradientDescentPyTorch(
            classifier,
            eps_step=case.fraction * case.eps,
            max_iter=case.steps,
            num_random_init=int(case.random_start),
            verbose=False,
            **common,
        )
    return torch.from_numpy(attack.generate(x.cpu().numpy(), ref.cpu().numpy())).to(x)


def _torchattacks(case: Case, model: nn.Module, x: Tensor, ref: Tensor) -> Tensor | None:
    ta = load_torchattacks()
    path: dict[str, Any] = {"eps": case.eps, "alpha": case.fraction * case.eps, "steps": case.steps}  # mixed types
    if not case.linf:
        # Its default adds 1e-10 to the gradient norm of the batch mean, which shortens steps from confident predictions.
        attack = ta.PGDL2(model, random_start=case.random_start, eps_for_division=1e-30, **path)
    elif case.steps == 1:
        attack = ta.FGSM(model, eps=case.eps)
    elif case.name in ("BIM", "MIFGSM"):
        attack = getattr(ta, case.name)(model, **path)
    else:
        attack = ta.PGD(model, random_start=case.random_start, **path)
    if case.targeted:
        attack.set_mode_targeted_by_label(quiet=True)
    x_adv: Tensor = attack(x, ref)
    return x_adv


# For each library: how it runs a case (None where it has no such attack), its import, and its distribution's name.
LIBRARIES: Mapping[str, tuple[Callable[[Case, nn.Module, Tensor, Tensor], Tensor | None], Callable[[], Any], str]] = (
    MappingProxyType(
        {
            "foolbox": (_foolbox, load_foolbox, "foolbox"),
            "art": (_run_art, load_art, "adversarial-robustness-toolbox"),
            "torchattacks": (_torchattacks, load_torchattacks, "torchattacks"),
        }
    )
)
