"""A copy is taught what the model says, and what fools it is asked of the model."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_problems import EPS, AnyOf, N, X, Y, ask, hard_and_easy, net
from torch import nn

from robustkit import L1, L2, ClassifyAs, Linf, Misclassify, Pixels
from robustkit._engine.noise import Noise
from robustkit.attacks.standard import substitute as _distil
from robustkit.attacks.standard.substitute import (
    Adam,
    SubstituteConfig,
    SubstituteModel,
    flatten_output,
    random_tiles,
    train_substitute,
    transfer_attack,
    unflatten_output,
)
from robustkit.goals import Goal
from robustkit.losses import margin

NOISE = Noise(0, torch.zeros(1, dtype=torch.int64))
SHAPES = st.lists(st.lists(st.integers(1, 3), max_size=3), min_size=1, max_size=3)


def firm(x):
    return torch.eye(3)[0].expand(len(x), 3)


@given(SHAPES)
def test_answers_of_any_shape_come_back_as_they_were(shapes):
    out = tuple(torch.randn(4, *shape) for shape in shapes)
    back = unflatten_output(flatten_output(out), out)
    assert all(torch.equal(one, other) for one, other in zip(back, out, strict=True))
    assert torch.equal(unflatten_output(flatten_output(out[0]), out[0]), out[0])


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5), L1(1.0), Pixels(2)])
@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 9, 5), (6,)])
def test_rough_points_lie_in_the_threat_set_and_spend_its_budget(threat, shape):
    if len(shape) == 1 and isinstance(threat, Pixels):
        return
    x = 0.5 + 0.2 * (torch.rand(5, *shape, generator=torch.Generator().manual_seed(0)) - 0.5)
    found = []

    def look(problem):
        found.extend(random_tiles(problem, draw) for draw in range(4))

    ask(look, firm, threat=threat, x=x, y=torch.zeros(5, dtype=torch.int64))
    for points in found:
        assert threat.contains(points, x).all()
        if isinstance(threat, Linf | L2):
            torch.testing.assert_close(
                threat.size(points, x), torch.full((5,), threat.eps, dtype=torch.float64), rtol=1e-4, atol=0
            )
    assert not torch.equal(found[0], found[1])


def test_tiles_are_as_large_as_they_are_said_to_be():
    x = torch.full((3, 2, 14, 14), 0.5)
    found = []
    ask(
        lambda p: found.extend(random_tiles(p, draw) for draw in range(4)),
        firm,
        threat=Linf(0.1),
        x=x,
        y=torch.zeros(3, dtype=torch.int64),
    )
    for points, side in zip(found, (1, 2, 4, 7), strict=True):
        inside = torch.arange(1, 14) % side > 0  # neighbours in one tile
        for steps in (points.diff(dim=2).transpose(2, 3), points.diff(dim=3)):
            assert not steps[..., inside].any()
            assert steps[..., ~inside].any()


def test_a_linear_model_is_learned():
    weight = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    points = torch.rand(400, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    told = 100 + 50 * points.flatten(1) @ weight  # in whatever units
    copy = SubstituteModel(points, told, NOISE, deep=False)
    copy.see(points[:300], told[:300])
    copy.learn(SubstituteConfig(1, steps=500))
    error = (copy(points[300:]) - told[300:]).square().mean()
    assert error < 0.05 * told.var()


def test_what_is_no_number_teaches_nothing_and_the_same_seed_teaches_the_same():
    points, told = X, X.flatten(1)[:, :3].clone()
    holes = told.clone()
    holes[::3] = torch.nan
    copies = []
    for answers in (holes, holes):
        copy = SubstituteModel(points, told, NOISE, deep=True)
        copy.see(points, answers)
        copy.learn(SubstituteConfig(1, steps=20))
        copies.append(copy(points))
    assert torch.equal(*copies)
    assert copies[0].isfinite().all()
    other = SubstituteModel(points, told, NOISE.at("other"), deep=True)
    other.see(points, holes)
    other.learn(SubstituteConfig(1, steps=20))
    assert not torch.equal(other(points), copies[0])


class Near(Goal):
    """Another answer than the reference, by so much."""

    def loss(self, out, ref):
        return 0.5 - (out[0] - ref).square().sum(1)

    def success(self, out, ref):
        return self.loss(out, ref) < 0

    def __repr__(self):
        return "Near()"


def blind(x):
    """A tuple, and no way back."""
    out = 4 * x.detach().flatten(1)[:, :2]
    return out, out.sum(1)


def test_a_goal_that_reads_a_tuple_is_reached_by_the_copy_and_every_question_counts():
    """The most that the budget allows is 2 (4 eps)^2."""
    x, calls = X[:, :, :1, :2].repeat(1, 1, 2, 1), []
    struck = []

    def model(z):
        calls.append(len(z))
        return blind(z)

    def transfer(problem):
        teaching = SubstituteConfig(points=4, steps=200)
        copy = train_substitute(problem, teaching)
        before = problem.unsolved.sum()
        struck.append(
            (
                int(before),
                [problem.threat.contains(point, problem.x).all() for point in transfer_attack(problem, copy, teaching)],
            )
        )

    eps = 0.15
    result = ask(transfer, model, x=x, y=blind(x)[0], threat=Linf(eps), goal=Near())
    assert 32 * eps**2 > 0.5
    assert result.success.all()
    assert sum(calls) == int(result.forwards.sum())
    assert all(struck)


def test_with_few_examples_more_is_asked_about_each():
    asked = {}
    for count in (1, N):

        def teach(problem):
            train_substitute(problem, SubstituteConfig(points=10, steps=1))

        result = ask(teach, net(), x=X[:count], y=net()(X[:count]).argmax(1), threat=Linf(1e-6))
        asked[count] = int(result.forwards[0])
    assert asked[1] - asked[N] == 10 * _distil._FEWEST - 10 * _distil._ENOUGH // N


def test_a_model_without_tensors_has_no_copy():
    found = []

    class Any(Near):
        def loss(self, out, ref):
            return ref.sum(1)

    ask(lambda p: found.append(train_substitute(p, SubstituteConfig(4, 4))), lambda x: "a word", y=torch.ones(N, 2), goal=Any())
    assert found == [None]
    assert isinstance(SubstituteModel(X, Y[:, None].float(), NOISE, deep=True)._net, nn.Module)
    assert EPS > 0


def test_the_optimiser_is_adam():
    """Ten steps beside torch's own; the small number in the denominator stands elsewhere, which is all that differs."""
    ours, theirs = (nn.Linear(4, 3) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    x, wanted = torch.rand(20, 4, generator=torch.Generator().manual_seed(0)), torch.ones(20, 3)
    one, other = Adam(list(ours.parameters())), torch.optim.Adam(theirs.parameters(), 2e-3)
    for _ in range(10):
        one.step((ours(x) - wanted).square().mean(), 2e-3)
        other.zero_grad()
        (theirs(x) - wanted).square().mean().backward()
        other.step()
    for mine, other_one in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other_one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("company", [0, 2, 5, 16, 1000])
def test_solved_examples_keep_a_few_others_company(min_examples):
    """Two are left; up to the number that is wished for, solved ones are asked about at each point too."""
    bright, x, y = hard_and_easy(2)
    counts = []

    def teach(problem):
        problem.success(problem.x + 0.2)
        before, kept = problem.cost, problem.best.clone()
        train_substitute(problem, SubstituteConfig(points=10, steps=1, min_examples=min_examples))
        counts.append(problem.cost - before)
        assert torch.equal(problem.best, kept)  # the first success stays

    x[-1] = 0.7  # bright without any change
    result = ask(teach, bright, x=x, y=y, threat=Linf(0.2))
    assert result.size[-1] == 0
    asked = min(max(2, min_examples), N)
    many = min(10 * _distil._FEWEST, 10 * _distil._ENOUGH // asked)
    assert counts[0].tolist() == [many + 1] * 2 + [many] * (asked - 2) + [0] * (N - asked)


@dataclass(frozen=True)
class NoParts(AnyOf):
    def parts(self, out, ref):
        return []


def test_strikes_go_for_the_likeliest_parts_or_for_the_whole():
    model = net()
    out = model(X)
    found = []

    def ways(problem):
        found.append(_distil._ways(Misclassify(margin), model, problem))

    ask(ways, model, y=Y, threat=Linf(1e-6))
    goal, refs = found[0]
    others = out.scatter(1, Y[:, None], -torch.inf).argsort(1, descending=True)
    assert goal == ClassifyAs().with_surrogate(margin)
    assert torch.equal(torch.stack(refs, 1), others[:, : len(refs)])
    assert len(refs) == min(_distil._PARTS, out.shape[1] - 1)
    whole = Near()
    assert _distil._ways(whole, model, SimpleNamespace(x=X, ref=Y)) == (whole, [Y])
    for goal in (AnyOf(), NoParts()):
        assert _distil._ways(goal, model, SimpleNamespace(x=X, ref=Y)) == (goal, [Y])


def test_each_turn_asks_at_points_of_its_own():
    seen = {}
    for turn in (0, 1):
        points = []

        def model(z, points=points):
            points.append(z.detach().clone())
            return net()(z)

        def both(problem, turn=turn):
            teaching = SubstituteConfig(points=4, steps=1)
            list(transfer_attack(problem, train_substitute(problem, teaching, turn), teaching, turn))

        ask(both, model, y=net()(X).argmax(1), threat=Linf(1e-6))
        seen[turn] = [point for point in points if not torch.equal(point, X) and len(point) >= N]
    assert len(seen[0]) == len(seen[1]) >= 5
    assert not any(torch.equal(one, other) for one, other in zip(*seen.values(), strict=True))


@pytest.mark.parametrize(
    "other", [SubstituteConfig(1, steps=4, batch=5), SubstituteConfig(1, steps=4, rate=1e-3), SubstituteConfig(1, steps=5)]
)
def test_batch_rate_and_steps_are_those_of_the_teaching(other):
    told = X.flatten(1)[:, :3].clone()
    answers = []
    for teaching in (SubstituteConfig(1, steps=4), SubstituteConfig(1, steps=4), other):
        copy = SubstituteModel(X, told, NOISE, deep=False)
        copy.see(X, told)
        copy.learn(teaching)
        answers.append(copy(X))
    assert torch.equal(answers[0], answers[1])
    assert not torch.allclose(answers[0], answers[2])
