"""Every attack, threat and goal of the tables obeys the laws."""

import pytest
from cases import ATTACKS, GOALS, THREATS

from robustkit.testing import check_attack, check_goal, check_threat


@pytest.mark.parametrize("row", ATTACKS, ids=lambda row: row.name)
def test_attack(row, cases):
    cases(check_attack(row.attack, serves=row.serves, exact=row.exact, within=row.within))


@pytest.mark.parametrize("kind", THREATS)
def test_threat(kind, cases):
    cases(check_threat(kind))


@pytest.mark.parametrize(("goal", "outputs"), GOALS, ids=lambda value: repr(value)[:60])
def test_goal(goal, outputs, cases):
    cases(check_goal(goal, outputs))
