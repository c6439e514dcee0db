"""The attacks of the escalation, each on a model that calls for it."""

import pytest
import torch
from small_problems import EPS, FLIPPED, SOUND, N, X, Y, all_rows, hard_and_easy, run_inside
from torch import nn

from robustkit import ClassifyAs, Linf, Misclassify, Target
from robustkit.attacks import Standard
from robustkit.attacks.standard import escalation
from robustkit.attacks.standard.escalation import SoftHinge, _descend_on_mean_gradient, _descend_on_sum
from robustkit.attacks.standard.substitute import SubstituteConfig
from robustkit.losses import margin


@pytest.mark.parametrize("goal", [Misclassify(), ClassifyAs()])
def test_the_soft_hinge_saturates_beyond_the_boundary(goal):
    out = torch.tensor([[8.0, 0.0], [0.0, 0.0], [0.0, 8.0]], requires_grad=True)
    ref = torch.zeros(3, dtype=torch.int64) + int(isinstance(goal, ClassifyAs))
    loss = SoftHinge(goal).loss(out, ref)
    margins = torch.tensor([8.0, 0.0, -8.0])
    torch.testing.assert_close(loss, torch.log1p((margins + 0.5).exp()))
    slopes = torch.autograd.grad(loss.sum(), out)[0][:, 0]
    torch.testing.assert_close(slopes, torch.sigmoid(margins + 0.5))
    assert SoftHinge(goal).success(out, ref).tolist() == goal.success(out, ref).tolist()


def competing(x):
    """The score of each example grows with its own pixels and falls with those of the others."""
    own = x.flatten(1).mean(1)
    return torch.stack([torch.full_like(own, 0.5), own - 0.8 * (own.mean() - own / len(own))], 1)


def test_the_joint_descent_returns_one_of_its_batches():
    batches, best = [], []

    def model(x):
        batches.append(x.detach().clone())
        return competing(x)

    def descend(problem):
        batch = problem.subproblem(all_rows(problem), keep="best")
        batches.clear()
        best.append(_descend_on_sum(batch.with_surrogate_loss(Misclassify(margin), batch.ref), batch.x, 1.0))

    y = torch.zeros(N, dtype=torch.int64)
    run_inside(descend, model, y=y, threat=Linf(0.1))
    sums = [float((0.5 - competing(x)[:, 1]).sum()) for x in batches]
    assert torch.equal(best[0], batches[sums.index(min(sums))])


def batch_dependent(x):
    """The sound network plus a term that depends on the mean of the batch."""
    return (x - x.mean(0)).flatten(1)[:, :3] * 20 + 0.3 * SOUND(x)


def test_each_example_is_evaluated_in_its_final_batch():
    y = batch_dependent(X).argmax(1)
    result = Standard()(batch_dependent, X, y, threat=Linf(EPS))
    assert {flag.name for flag in result.flags} >= {"batch-dependent"}
    assert torch.equal(result.success, batch_dependent(result.x_adv).argmax(1) != y)
    assert Linf(EPS).contains(result.x_adv, X).all()
    assert result.success.sum() >= N / 2
    assert "unsteady-target" not in {message.name for message in (*result.flags, *result.notes)}


class NoisySlope(nn.Module):
    """A linear model with noise of five times the length of its weights, drawn for each row and call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", (torch.rand(16, generator=torch.Generator().manual_seed(0)) > 0.5).float() * 2 - 1)

    def forward(self, x):
        noise = 5 * torch.randn(len(x), 16)
        flat = x.flatten(1) - 0.5
        return torch.stack([torch.zeros(len(x)), flat @ self.weight + (noise * flat).sum(1)], 1)


def test_gradients_are_averaged_over_draws_and_steps(monkeypatch):
    model, ends = NoisySlope(), []

    def descend(problem):
        goal = problem.goal.with_surrogate_loss(margin)
        for averaged in (problem, problem.with_eot_draws(2)):
            ends.append(_descend_on_mean_gradient(averaged.with_surrogate_loss(goal, problem.ref), problem.x, 2.0))
        monkeypatch.setattr(escalation, "_EOT_DECAY", 0.0)
        ends.append(_descend_on_mean_gradient(problem.with_surrogate_loss(goal, problem.ref), problem.x, 2.0))

    run_inside(descend, Target(model, stochastic=True), y=torch.zeros(N, dtype=torch.int64), threat=Linf(EPS))
    agreement = [((end - X).flatten(1).sign() == model.weight).double().mean() for end in ends]
    assert agreement[0] > 0.75  # a single gradient has 58 % of the signs right: Phi(1 / 5)
    assert agreement[1] > agreement[0] > agreement[2] + 0.03


class SometimesWrong(nn.Module):
    """Wrong with probability 1/5, whatever the input."""

    def forward(self, x):
        wrong = (torch.rand(len(x)) < 0.2).float()
        return torch.stack([1 - wrong, wrong], 1) + 0 * x.flatten(1).sum(1, keepdim=True)


@pytest.mark.slow
def test_a_lucky_draw_is_not_a_success(monkeypatch):
    monkeypatch.setattr(escalation, "_SUBSTITUTE", SubstituteConfig(points=4, steps=10))
    result = Standard()(Target(SometimesWrong(), stochastic=True), X, torch.zeros(N, dtype=torch.int64), threat=Linf(EPS))
    assert "escalated" in {note.name for note in result.notes}
    assert not result.success.any()


@pytest.mark.slow
def test_further_views_are_attacked():
    """The default view has a flipped gradient, the second one does not."""

    class FlippedGradient(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = FLIPPED

        def forward(self, x):
            return self.net(x)

    fn = FlippedGradient()
    result = Standard()(Target(fn, views={"exact": fn, "unmasked": SOUND}), X, Y, threat=Linf(EPS))
    (why,) = [note.why for note in result.notes if note.name == "escalated"]
    assert "view unmasked" in why
    best = Standard(audit=False)(SOUND, X, Y, threat=Linf(EPS))
    assert (~result.success).sum() <= (~best.success).sum() + 1


@pytest.mark.parametrize(("hard", "attempts"), [(N, 1), (N - 3, 2), (0, 1)])
def test_a_second_attempt_is_made_only_where_the_first_breaks_some_but_not_all(hard, attempts, monkeypatch):
    monkeypatch.setattr(escalation, "_ATTEMPTS", ((25, 25), (50, 40)))
    monkeypatch.setattr(escalation, "_PATCH_QUERIES", 25)
    monkeypatch.setattr(escalation, "_SUBSTITUTE", SubstituteConfig(points=4, steps=10))
    bright, x, y = hard_and_easy(hard)
    attacks = []
    result = run_inside(
        lambda problem: attacks.extend(escalation._further_attacks(problem)), bright, x=x, y=y, threat=Linf(0.2)
    )
    assert int((~result.success).sum()) == hard
    assert ("the same again with 50 score and 40 decision queries per example" in attacks) is (attempts == 2)
    cost = (result.forwards + result.backwards)[:hard]
    assert bool((cost > 2 * (25 + 25 + 25)).all()) is (attempts == 2 or not hard)
