"""What is done where an alarm goes off, each mechanism on a model that it is for."""

import pytest
import torch
from small_problems import EPS, FLIPPED, SOUND, N, X, Y, ask, everyone, hard_and_easy
from torch import nn

from robustkit import ClassifyAs, Linf, Misclassify, Target
from robustkit.attacks import Standard
from robustkit.attacks.standard import escalation as _escalation
from robustkit.attacks.standard.escalation import SoftHinge, _averaged, _joint_descent
from robustkit.attacks.standard.substitute import SubstituteConfig
from robustkit.losses import margin


@pytest.mark.parametrize("goal", [Misclassify(), ClassifyAs()])
def test_the_hinge_counts_an_example_less_the_further_it_is_beyond_the_border(goal):
    out = torch.tensor([[8.0, 0.0], [0.0, 0.0], [0.0, 8.0]], requires_grad=True)
    ref = torch.zeros(3, dtype=torch.int64) + int(isinstance(goal, ClassifyAs))
    loss = SoftHinge(goal).loss(out, ref)
    edges = torch.tensor([8.0, 0.0, -8.0])
    torch.testing.assert_close(loss, torch.log1p((edges + 0.5).exp()))
    slopes = torch.autograd.grad(loss.sum(), out)[0][:, 0]
    torch.testing.assert_close(slopes, torch.sigmoid(edges + 0.5))
    assert SoftHinge(goal).success(out, ref).tolist() == goal.success(out, ref).tolist()


def crowded(x):
    """Each row's answer depends on all: what its own pixels win, the sum of all the others' loses."""
    own = x.flatten(1).mean(1)
    return torch.stack([torch.full_like(own, 0.5), own - 0.8 * (own.mean() - own / len(own))], 1)


def test_the_batch_that_comes_back_was_one_batch():
    seen, found = [], []

    def model(x):
        seen.append(x.detach().clone())
        return crowded(x)

    def joint(problem):
        batch = problem.subproblem(everyone(problem), keep="best")
        seen.clear()
        found.append(_joint_descent(batch.with_surrogate(Misclassify(margin), batch.ref), batch.x, 1.0))

    y = torch.zeros(N, dtype=torch.int64)
    ask(joint, model, y=y, threat=Linf(0.1))
    sums = [float((0.5 - crowded(x)[:, 1]).sum()) for x in seen]
    assert torch.equal(found[0], seen[sums.index(min(sums))])


def of_the_batch(x):
    return (x - x.mean(0)).flatten(1)[:, :3] * 20 + 0.3 * SOUND(x)


def test_what_depends_on_company_is_judged_in_the_company_in_which_it_stands():
    fn = of_the_batch
    y = fn(X).argmax(1)
    result = Standard()(fn, X, y, threat=Linf(EPS))
    assert {flag.name for flag in result.flags} >= {"batch-dependent"}
    assert torch.equal(result.success, fn(result.x_adv).argmax(1) != y)
    assert Linf(EPS).contains(result.x_adv, X).all()
    assert result.success.sum() >= N / 2
    assert "unsteady-target" not in {message.name for message in (*result.flags, *result.notes)}


class Rough(nn.Module):
    """A linear model whose slope is hidden in noise of five times its length, drawn anew for each row of each call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", (torch.rand(16, generator=torch.Generator().manual_seed(0)) > 0.5).float() * 2 - 1)

    def forward(self, x):
        noise = 5 * torch.randn(len(x), 16)
        flat = x.flatten(1) - 0.5
        return torch.stack([torch.zeros(len(x)), flat @ self.weight + (noise * flat).sum(1)], 1)


def test_gradients_are_averaged_over_steps_too(monkeypatch):
    model, ends = Rough(), []

    def climb(problem):
        goal = problem.goal.with_surrogate(margin)
        for drawn in (problem, problem.with_eot_draws(2)):
            ends.append(_averaged(drawn.with_surrogate(goal, problem.ref), problem.x, 2.0))
        monkeypatch.setattr(_escalation, "_FADING", 0.0)
        ends.append(_averaged(problem.with_surrogate(goal, problem.ref), problem.x, 2.0))

    ask(climb, Target(model, stochastic=True), y=torch.zeros(N, dtype=torch.int64), threat=Linf(EPS))
    agree = [((end - X).flatten(1).sign() == model.weight).double().mean() for end in ends]
    assert agree[0] > 0.75  # of a single gradient 58 % of the signs are right: Phi(1 / 5)
    assert agree[1] > agree[0] > agree[2] + 0.03


class Lucky(nn.Module):
    """Right on four calls of five, whatever it is asked."""

    def forward(self, x):
        wrong = (torch.rand(len(x)) < 0.2).float()
        return torch.stack([1 - wrong, wrong], 1) + 0 * x.flatten(1).sum(1, keepdim=True)


def test_luck_is_no_success(monkeypatch):
    monkeypatch.setattr(_escalation, "_COPY", SubstituteConfig(points=4, steps=10))
    result = Standard()(Target(Lucky(), stochastic=True), X, torch.zeros(N, dtype=torch.int64), threat=Linf(EPS))
    assert "escalated" in {note.name for note in result.notes}
    assert not result.success.any()


def test_a_view_that_tells_the_truth_is_used():
    """Behind the default view, whose gradient is turned, stands one that is not."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = FLIPPED

        def forward(self, x):
            return self.net(x)

    fn = Turned()
    result = Standard()(Target(fn, views={"exact": fn, "straight": SOUND}), X, Y, threat=Linf(EPS))
    (why,) = [note.why for note in result.notes if note.name == "escalated"]
    assert "view straight" in why
    best = Standard(audit=False)(SOUND, X, Y, threat=Linf(EPS))
    assert (~result.success).sum() <= (~best.success).sum() + 1


@pytest.mark.parametrize(("hard", "turns"), [(N, 1), (N - 3, 2), (0, 1)])
def test_what_is_left_is_tried_harder_only_where_the_first_turn_helps(hard, turns, monkeypatch):
    """Of what nothing breaks no more is asked, nor where nothing is left."""
    monkeypatch.setattr(_escalation, "_TURNS", ((25, 25), (50, 40)))
    monkeypatch.setattr(_escalation, "_WINDOWS", 25)
    monkeypatch.setattr(_escalation, "_COPY", SubstituteConfig(points=4, steps=10))
    bright, x, y = hard_and_easy(hard)
    done = []
    result = ask(lambda problem: done.extend(_escalation._further(problem)), bright, x=x, y=y, threat=Linf(0.2))
    assert int((~result.success).sum()) == hard
    assert ("all that once more with 50 scores and 40 decisions of each" in done) is (turns == 2)
    paid = (result.forwards + result.backwards)[:hard]
    assert bool((paid > 2 * (25 + 25 + 25)).all()) is (turns == 2 or not hard)
