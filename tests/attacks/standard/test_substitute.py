"""Substitute models: their training data, their training, and transfer attacks."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_problems import AnyOf, N, X, Y, hard_and_easy, net, run_inside
from torch import nn

from robustkit import L1, L2, ClassifyAs, Linf, Misclassify, Pixels
from robustkit._engine.noise import Noise
from robustkit.attacks.standard import substitute as substitute_module
from robustkit.attacks.standard.substitute import (
    Adam,
    SubstituteConfig,
    SubstituteModel,
    _likeliest_parts,
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


def constant(x):
    """Class 0 whatever the input."""
    return torch.eye(3)[0].expand(len(x), 3)


@given(SHAPES)
def test_unflatten_output_is_the_inverse_of_flatten_output(shapes):
    out = tuple(torch.randn(4, *shape) for shape in shapes)
    back = unflatten_output(flatten_output(out), out)
    assert all(torch.equal(actual, expected) for actual, expected in zip(back, out, strict=True))
    assert torch.equal(unflatten_output(flatten_output(out[0]), out[0]), out[0])


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5), L1(1.0), Pixels(2)])
@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 9, 5), (6,)])
def test_random_tiles_lie_in_the_threat_set_and_spend_the_budget(threat, shape):
    if len(shape) == 1 and isinstance(threat, Pixels):
        return
    x = 0.5 + 0.2 * (torch.rand(5, *shape, generator=torch.Generator().manual_seed(0)) - 0.5)
    tiles = []
    run_inside(
        lambda p: tiles.extend(random_tiles(p, draw) for draw in range(4)),
        constant,
        threat=threat,
        x=x,
        y=torch.zeros(5, dtype=torch.int64),
    )
    for points in tiles:
        assert threat.contains(points, x).all()
        if isinstance(threat, Linf | L2):
            torch.testing.assert_close(
                threat.size(points, x), torch.full((5,), threat.eps, dtype=torch.float64), rtol=1e-4, atol=0
            )
    assert not torch.equal(tiles[0], tiles[1])


def test_tiles_have_sides_of_one_two_four_and_seven_pixels():
    x = torch.full((3, 2, 14, 14), 0.5)
    tiles, y = [], torch.zeros(3, dtype=torch.int64)
    run_inside(lambda p: tiles.extend(random_tiles(p, draw) for draw in range(4)), constant, threat=Linf(0.1), x=x, y=y)
    for points, side in zip(tiles, (1, 2, 4, 7), strict=True):
        same_tile = torch.arange(1, 14) % side > 0
        for differences in (points.diff(dim=2).transpose(2, 3), points.diff(dim=3)):
            assert not differences[..., same_tile].any()
            assert differences[..., ~same_tile].any()


def test_a_linear_model_is_fitted():
    weight = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    points = torch.rand(400, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    outputs = 100 + 50 * points.flatten(1) @ weight  # in arbitrary units
    substitute = SubstituteModel(points, outputs, NOISE, convolutional=False)
    substitute.add_data(points[:300], outputs[:300])
    substitute.fit(SubstituteConfig(1, steps=500))
    error = (substitute(points[300:]) - outputs[300:]).square().mean()
    assert error < 0.05 * outputs.var()


def test_undefined_outputs_are_ignored_and_training_depends_on_the_noise_alone():
    outputs = X.flatten(1)[:, :3].clone()
    with_nan = outputs.clone()
    with_nan[::3] = torch.nan

    def predictions(noise):
        substitute = SubstituteModel(X, outputs, noise, convolutional=True)
        substitute.add_data(X, with_nan)
        substitute.fit(SubstituteConfig(1, steps=20))
        return substitute(X)

    first = predictions(NOISE)
    assert torch.equal(predictions(NOISE), first)
    assert first.isfinite().all()
    assert not torch.equal(predictions(NOISE.at("other")), first)


class Above(Goal):
    """The sum of the first output exceeds that of the reference by more than one."""

    def loss(self, out, ref):
        return 1 - (out[0] - ref).sum(1)

    def success(self, out, ref):
        return self.loss(out, ref) < 0

    def __repr__(self):
        return "Above()"


def detached(x):
    """A tuple without a graph."""
    out = 4 * x.detach().flatten(1)[:, :2]
    return out, out.sum(1)


def test_a_goal_on_a_tuple_is_reached_by_transfer_and_every_query_counts():
    """The budget allows an increase of at most 8 eps, at one corner of the ball."""
    x, calls = X[:, :, :1, :2].repeat(1, 1, 2, 1), []
    inside = []

    def model(z):
        calls.append(len(z))
        return detached(z)

    def transfer(problem):
        config = SubstituteConfig(points=4, steps=200)
        substitute = train_substitute(problem, config)
        inside.extend(problem.threat.contains(x_adv, problem.x) for x_adv in transfer_attack(problem, substitute, config))

    eps = 0.15
    result = run_inside(transfer, model, x=x, y=detached(x)[0], threat=Linf(eps), goal=Above())
    assert 8 * eps > 1
    assert result.success.all()
    assert sum(calls) == int(result.forwards.sum())
    assert torch.cat(inside).all()


def test_with_few_examples_each_is_queried_at_more_points():
    queries = {}
    for count in (1, N):

        def train(problem):
            train_substitute(problem, SubstituteConfig(points=10, steps=1))

        result = run_inside(train, net(), x=X[:count], y=net()(X[:count]).argmax(1), threat=Linf(1e-6))
        queries[count] = int(result.forwards[0])
    assert queries[1] - queries[N] == 10 * substitute_module._MAX_FACTOR - 10 * substitute_module._MIN_EXAMPLES // N


def test_a_model_whose_output_is_not_a_tensor_has_no_substitute():
    substitutes = []

    class ReadsReference(Above):
        def loss(self, out, ref):
            return ref.sum(1)

    def train(problem):
        substitutes.append(train_substitute(problem, SubstituteConfig(4, 4)))

    run_inside(train, lambda x: "a string", y=torch.ones(N, 2), goal=ReadsReference())
    assert substitutes == [None]


def test_the_optimizer_is_adam():
    """Ten steps against torch's, which differs only in where epsilon is added."""
    ours, theirs = (nn.Linear(4, 3) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    x, wanted = torch.rand(20, 4, generator=torch.Generator().manual_seed(0)), torch.ones(20, 3)
    our_adam, torch_adam = Adam(list(ours.parameters())), torch.optim.Adam(theirs.parameters(), 2e-3)
    for _ in range(10):
        our_adam.step((ours(x) - wanted).square().mean(), 2e-3)
        torch_adam.zero_grad()
        (theirs(x) - wanted).square().mean().backward()
        torch_adam.step()
    for actual, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("min_examples", [0, 2, 5, 16, 1000])
def test_solved_examples_are_queried_too_where_few_are_unsolved(min_examples):
    """Two examples are unsolved; solved ones are added up to `min_examples`."""
    bright, x, y = hard_and_easy(2)
    costs = []

    def train(problem):
        problem.success(problem.x + 0.2)
        before, kept = problem.cost, problem.best.clone()
        train_substitute(problem, SubstituteConfig(points=10, steps=1, min_examples=min_examples))
        costs.append(problem.cost - before)
        assert torch.equal(problem.best, kept)  # the first success stays

    x[-1] = 0.7  # bright without a perturbation
    result = run_inside(train, bright, x=x, y=y, threat=Linf(0.2))
    assert result.size[-1] == 0
    queried = min(max(2, min_examples), N)
    points = min(10 * substitute_module._MAX_FACTOR, 10 * substitute_module._MIN_EXAMPLES // queried)
    assert costs[0].tolist() == [points + 1] * 2 + [points] * (queried - 2) + [0] * (N - queried)


@dataclass(frozen=True)
class NoParts(AnyOf):
    def parts(self, out, ref):
        return []


def test_attacks_aim_at_the_likeliest_parts_or_at_the_whole_goal():
    model = net()
    out = model(X)
    aims = []

    def rank(problem):
        aims.append(_likeliest_parts(Misclassify(margin), model, problem))

    run_inside(rank, model, y=Y, threat=Linf(1e-6))
    goal, refs = aims[0]
    others = out.scatter(1, Y[:, None], -torch.inf).argsort(1, descending=True)
    assert goal == ClassifyAs().with_surrogate_loss(margin)
    assert torch.equal(torch.stack(refs, 1), others[:, : len(refs)])
    assert len(refs) == min(substitute_module._MAX_PARTS, out.shape[1] - 1)
    whole = Above()
    assert _likeliest_parts(whole, model, SimpleNamespace(x=X, ref=Y)) == (whole, [Y])
    for goal in (AnyOf(), NoParts()):
        assert _likeliest_parts(goal, model, SimpleNamespace(x=X, ref=Y)) == (goal, [Y])


def test_each_attempt_has_its_own_points():
    queried = {}
    for attempt in (0, 1):
        points = []

        def model(z, points=points):
            points.append(z.detach().clone())
            return net()(z)

        def run(problem, attempt=attempt):
            config = SubstituteConfig(points=4, steps=1)
            list(transfer_attack(problem, train_substitute(problem, config, attempt), config, attempt))

        run_inside(run, model, y=net()(X).argmax(1), threat=Linf(1e-6))
        queried[attempt] = [batch for batch in points if not torch.equal(batch, X) and len(batch) >= N]
    assert len(queried[0]) == len(queried[1]) >= 5
    assert not any(torch.equal(first, second) for first, second in zip(*queried.values(), strict=True))


@pytest.mark.parametrize(
    "other",
    [SubstituteConfig(1, steps=4, batch=5), SubstituteConfig(1, steps=4, learning_rate=1e-3), SubstituteConfig(1, steps=5)],
)
def test_batch_learning_rate_and_steps_are_those_of_the_config(other):
    outputs = X.flatten(1)[:, :3].clone()

    def predictions(config):
        substitute = SubstituteModel(X, outputs, NOISE, convolutional=False)
        substitute.add_data(X, outputs)
        substitute.fit(config)
        return substitute(X)

    default = predictions(SubstituteConfig(1, steps=4))
    assert torch.equal(predictions(SubstituteConfig(1, steps=4)), default)
    assert not torch.allclose(predictions(other), default)
