"""Tables of attacks, threats and goals: all laws are tested on each row."""

from dataclasses import dataclass

from hypothesis import strategies as st

from robustkit import FGSM, L1, L2, MIFGSM, PGD, ClassifyAs, Linf, Misclassify, Pixels
from robustkit.attacks import (
    APGD,
    FAB,
    FMN,
    L1APGD,
    DeepFool,
    OnePixel,
    PixelSearch,
    RayS,
    SparseRS,
    Square,
    UniversalDeepFool,
    UniversalPGD,
    UniversalSingular,
)
from robustkit.losses import cross_entropy, dlr, margin
from robustkit.testing.strategies import labels, logits


@dataclass(frozen=True)
class AttackRow:
    attack: object
    serves: tuple = (Linf, L2, L1, Pixels)
    exact: tuple = ()  # threats in which a hyperplane is crossed whenever the budget allows it
    within: float | None = None  # minimum-norm attacks: largest ratio of the size to the optimum

    @property
    def name(self):
        return repr(self.attack)


ATTACKS = [
    AttackRow(FGSM(), exact=(Linf, L2)),
    AttackRow(PGD(steps=12), exact=(Linf,)),
    # The same loop with other settings: in the threats where these make a difference.
    AttackRow(PGD(), serves=(L2,), exact=(L2,)),
    AttackRow(PGD(steps=12, random_start=False), serves=(Linf, L2), exact=(Linf, L2)),
    AttackRow(PGD(steps=5, step_size=0.02), serves=(Linf, L1)),
    AttackRow(MIFGSM(), exact=(Linf, L2)),
    AttackRow(DeepFool(), serves=(Linf, L2), exact=(Linf, L2), within=1.021),
    AttackRow(APGD(steps=12), serves=(Linf, L2), exact=(Linf, L2)),
    AttackRow(APGD(steps=8, loss="dlr", restarts=2), serves=(Linf, L2)),
    AttackRow(APGD(steps=6, loss="targeted-dlr", targets=2), serves=(Linf, L2)),
    AttackRow(L1APGD(steps=25), serves=(L1,)),
    AttackRow(FAB(steps=20, parts=2), serves=(Linf, L2), exact=(Linf, L2), within=1.02),
    AttackRow(FMN(steps=30), exact=(Linf, L2), within=1.02),
    AttackRow(Square(queries=12), serves=(Linf, L2)),
    AttackRow(RayS(queries=20), serves=(Linf, L2)),
    AttackRow(UniversalPGD(epochs=2, batch=3, starts=2), serves=(Linf, L2)),
    AttackRow(UniversalDeepFool(passes=2, batch=2), serves=(Linf, L2)),
    AttackRow(UniversalSingular(images=3, iterations=3), serves=(Linf, L2)),
    AttackRow(OnePixel(population=6, generations=2), serves=(Pixels,)),
    AttackRow(OnePixel(population=6, generations=2, recipe="paper"), serves=(Pixels,)),
    AttackRow(PixelSearch(queries=20, at_once=4), serves=(Pixels,)),
    AttackRow(SparseRS(queries=12), serves=(Pixels,)),
]

THREATS = [Linf, L2, L1, Pixels]


def classified(classes):
    """A strategy for pairs (logits, labels) of 1 to 5 examples."""
    return st.integers(1, 5).flatmap(lambda n: st.tuples(logits(n, classes), labels(n, classes)))


GOALS = [
    (goal(surrogate), classified(classes))
    for goal in (Misclassify, ClassifyAs)
    for surrogate in (cross_entropy, margin, dlr)
    for classes in (2, 3, 10)
]
