"""Attacks along every view: recomputed view by view, on a target whose views each have gradients for other images."""

from dataclasses import dataclass
from typing import ClassVar, final

import pytest
import torch
from torch import nn

from robustkit import FGSM, PGD, Linf, Target
from robustkit.attack import Attack
from robustkit.attacks import FMN, Square, Standard, UniversalPGD
from robustkit.bench.execution.views import attack_every_view, views_used
from robustkit.goals import Misclassify
from robustkit.result import Result

torch.manual_seed(0)
NET = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
X = torch.rand(30, 1, 3, 4)
with torch.no_grad():
    Y = NET(X).argmax(1)
IDS = torch.arange(30) + 7
OPTIONS = {"goal": Misclassify(), "threat": Linf(0.15), "seed": 3}


def half(bright):
    """A view that has a gradient for bright images or for dark ones, and none for the others."""

    def view(x):
        has_gradient = (x.detach().flatten(1).mean(1) > 0.5) == bright
        return torch.where(has_gradient[:, None], NET(x), NET(x.detach()))

    return view


TARGET = Target(NET, NET, {"bright": half(True), "dark": half(False)}, batch_size=8)
ATTACK = PGD(steps=8, random_start=False)


def run(attack=ATTACK, target=TARGET, keep="first", starts=None):
    return attack_every_view(attack, target, X, Y, ids=IDS, keep=keep, starts=starts, **OPTIONS)


def plain(view, rows=slice(None), attack=ATTACK, keep="first"):
    return attack(TARGET.with_view(view), X[rows], Y[rows], ids=IDS[rows], keep=keep, **OPTIONS)


def test_each_further_view_is_attacked_on_the_unsolved_examples_and_all_passes_are_counted():
    whole, first = run(), plain("bright")
    unsolved = (~first.success).nonzero().squeeze(1)
    second = plain("dark", unsolved)
    assert 0 < len(unsolved) < 30
    assert 0 < second.success.sum() < len(unsolved)
    assert int(whole.success.sum()) == int(first.success.sum()) + int(second.success.sum())
    assert torch.equal(whole.success, NET(whole.x_adv).argmax(1) != Y)
    assert torch.equal(whole.x_adv[first.success], first.x_adv[first.success])
    assert torch.equal(whole.x_adv[unsolved[second.success]], second.x_adv[second.success])
    for name in ("forwards", "backwards"):
        expected = getattr(first, name).clone()
        expected[unsolved] += getattr(second, name)
        assert torch.equal(getattr(whole, name), expected)


def test_stages_of_a_further_view_carry_its_name_and_count_what_each_solved():
    whole = run()
    names = [stage.name for stage in whole.stages]
    assert names == ["clean", "attack", "clean along dark", "attack along dark"]
    for number, stage in enumerate(whole.stages):
        assert stage.solved == int((whole.solver == number).sum())
    assert sum(stage.forwards for stage in whole.stages) == int(whole.forwards.sum())
    assert sum(stage.backwards for stage in whole.stages) == int(whole.backwards.sum())
    # As the bench joins blocks, here one without unsolved examples for the second view.
    joined = Result.cat([whole, plain("bright", slice(0, 5))])
    assert [stage.name for stage in joined.stages] == names


def test_an_example_has_flat_gradients_only_if_it_has_them_along_every_view():
    whole, views = run(), {name: plain(name) for name in TARGET.views}
    robust = ~whole.success
    assert 2 * int(whole.flat[robust].sum()) <= int(whole.backwards[robust].sum())
    assert all(2 * int(one.flat.sum()) > int(one.backwards.sum()) / 2 for one in views.values())
    nothing = Target(NET, NET, {name: lambda x: NET(x.detach()) for name in ("a", "b")}, batch_size=8)
    blind = run(target=nothing)
    assert torch.equal(blind.flat, blind.backwards)
    assert [flag.name for flag in blind.flags] == ["flat-gradients"]


def test_a_flag_of_a_further_view_is_a_note():
    target = Target(NET, NET, {"exact": NET, "blind": lambda x: NET(x.detach())}, batch_size=8)
    whole = run(target=target)
    assert not whole.flags
    (note,) = [note for note in whole.notes if note.name == "other-view"]
    assert note.why.startswith("view 'blind' by itself would raise flat-gradients: ")


@pytest.mark.slow
def test_the_audit_of_standard_runs_once():
    """It checks the deployed function; along a view without gradients it would escalate."""
    target = Target(NET, NET, {"exact": NET, "blind": lambda x: NET(x.detach())}, batch_size=8)
    names = [stage.name for stage in run(Standard(), target).stages]
    assert "audit" in names
    assert "parts along blind" in names
    assert not {"audit along blind", "escalation along blind"} & set(names)


def test_the_smallest_perturbation_over_all_views_is_kept():
    attack = FMN(steps=20)
    whole, views = run(attack, keep="smallest"), [plain(name, attack=attack, keep="smallest") for name in TARGET.views]
    sizes = torch.stack([torch.where(one.success, one.size, torch.inf) for one in views]).amin(0)
    assert torch.equal(torch.where(whole.success, whole.size, torch.inf), sizes)
    assert torch.equal(whole.success, torch.isfinite(sizes))
    torch.testing.assert_close((whole.x_adv - X).abs().flatten(1).amax(1).double(), whole.size)


def test_if_all_examples_are_solved_no_further_view_is_called():
    def never(x):
        raise AssertionError

    target = Target(NET, NET, {"exact": NET, "never": never}, batch_size=8)
    whole = attack_every_view(FGSM(), target, X, (Y + 1) % 3, ids=IDS, keep="first", starts=None, **OPTIONS)
    assert whole.success.all()


@final
@dataclass(frozen=True)
class NoQueries(Attack):
    """Makes no query; has score access."""

    access: ClassVar = "score"

    def run(self, problem):
        return problem.x


@pytest.mark.parametrize(
    ("attack", "views"), [(PGD(), ("bright", "dark")), (NoQueries(), ()), (Square(), ()), (UniversalPGD(), ("bright",))]
)
def test_which_views_an_attack_uses(attack, views):
    assert views_used(attack, TARGET) == views
    assert views_used(attack, Target(NET)) == (("exact",) if attack.access == "white" else ())


def test_with_one_view_it_is_the_attack_itself():
    one, other = run(target=Target(NET, batch_size=8)), ATTACK(Target(NET, batch_size=8), X, Y, ids=IDS, **OPTIONS)
    assert torch.equal(one.x_adv, other.x_adv)
    assert (one.stages, one.notes) == (other.stages, other.notes)
