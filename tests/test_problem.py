from dataclasses import dataclass

import pytest
import torch
from torch import nn

from robustkit import PGD, Attack, Linf, Target
from robustkit.goals import ClassifyAs, Misclassify
from robustkit.losses import margin
from robustkit.testing.nets import Counter

X = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))


NET = net()
Y = NET(X).argmax(1)


@dataclass(frozen=True)
class Ask(Attack):
    """Runs a function on the problem: the inside of an attack, seen from a test."""

    question: object

    def run(self, problem):
        return self.question(problem)


def ask(question, target=NET, goal=Misclassify(), keep="last", **options):
    seen = {}

    def run(problem):
        seen["answer"] = question(problem)
        return problem.x

    result = Ask(run)(target, X, Y, goal=goal, threat=Linf(0.1), keep=keep, **options)
    return seen.get("answer"), result


def test_loss_and_gradient_are_those_of_autograd():
    x = X.clone().requires_grad_()
    loss = -nn.functional.cross_entropy(NET(x), Y, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), x)
    (ours, our_grad), _ = ask(lambda p: p.loss_and_grad(p.x))
    assert torch.equal(ours, loss.detach())
    assert torch.equal(our_grad, grad)
    assert torch.equal(ask(lambda p: p.loss(p.x))[0], loss.detach())


@pytest.mark.parametrize("rows", [slice(None), torch.tensor([3, 1])])
def test_the_loss_of_another_goal_can_be_followed_while_success_is_still_that_of_the_first(rows):
    wanted = NET(X).argmin(1)

    def question(problem):
        part = problem.with_surrogate_loss(ClassifyAs(margin), wanted)[rows]
        return part.loss(part.x), *part.loss_and_grad(part.x), part.success(part.x), part[:1].loss(part.x[:1])

    (loss, again, grad, success, first), result = ask(question, keep="best")
    x = X[rows].clone().requires_grad_()
    expected = margin(NET(x), wanted[rows])
    assert torch.equal(loss, expected.detach())
    assert torch.equal(again, expected.detach())
    torch.testing.assert_close(first, expected[:1].detach())  # one image alone: another kernel may round otherwise
    assert torch.equal(grad, torch.autograd.grad(expected.sum(), x)[0])
    assert torch.equal(success, NET(X[rows]).argmax(1) != Y[rows])
    assert torch.equal(result.success, NET(X).argmax(1) != Y)


def test_solved_examples_leave_and_come_back_as_zero():
    first = (torch.arange(6) < 2).reshape(-1, 1, 1, 1)

    def question(problem):
        away = torch.where(first, 1 - problem.x, problem.x)
        problem._best.unsolved[:2] = False  # as if solved
        return problem.loss_and_grad(away), problem.success(away), problem.loss(away)

    counter = Counter(NET)
    ((loss, grad), success, again), result = ask(question, target=counter, keep="first")
    assert (loss[:2] == 0).all()
    assert (grad[:2] == 0).all()
    assert (grad[2:] != 0).any()
    assert success[:2].all()
    assert (again[:2] == 0).all()
    assert result.forwards.tolist() == [2, 2, 5, 5, 5, 5]  # clean and verdict; for those who stayed three more
    assert counter.seen == 24


def test_steps_end_when_all_are_solved():
    def question(problem):
        taken = []
        for step in problem.steps(9):
            taken.append(step)
            problem._best.unsolved[:] = step < 3
        return taken

    assert ask(question, keep="first")[0] == [0, 1, 2, 3]
    assert ask(lambda p: list(p.steps(4)), keep="best")[0] == [0, 1, 2, 3]


def test_parts_of_a_problem_share_its_ledger_and_keep_their_noise():
    def question(problem):
        rows = torch.tensor([4, 1])
        part = problem[rows]
        inner = part[torch.tensor([1])]  # example 1
        inner.loss(inner.x)
        assert torch.equal(part.noise("a").uniform(3), problem.noise("a").uniform(3)[rows])
        assert torch.equal(inner.start(), problem.start()[1:2])
        return (
            [len(batch) for batch in problem.batches(4)],
            inner.loss_and_grad(inner.x)[1],
            problem.loss_and_grad(problem.x)[1],
        )

    (sizes, part, whole), result = ask(question)
    assert sizes == [4, 2]
    torch.testing.assert_close(part, whole[1:2])
    assert result.forwards.tolist() == [2, 4, 2, 2, 2, 2]  # one for all, two for example 1, one verdict


class Detached(nn.Module):
    def forward(self, x):
        return NET(x.detach())


class Rounded(nn.Module):
    def forward(self, x):
        return NET((x * 7).round() / 7)


class Undefined(nn.Module):
    def forward(self, x):
        return NET(x) + (x[:, 0, 0, :1] * 0).sqrt()  # the derivative of the root is infinite at zero, times zero


@pytest.mark.parametrize("module", [Detached(), Rounded(), Undefined()], ids=lambda m: type(m).__name__)
def test_gradients_without_signal_are_counted_and_finite(module):
    (_, grad), result = ask(lambda p: p.loss_and_grad(p.x), target=module)
    assert grad.isfinite().all()
    assert result.flat.tolist() == [1] * 6
    assert ask(lambda p: p.loss_and_grad(p.x))[1].flat.tolist() == [0] * 6


def test_the_adversary_differentiates_the_view_and_is_judged_on_the_function():
    """An eight-level quantiser: its own gradient is zero; the straight-through view leads to the same goal as no quantiser."""
    quantiser, y = Rounded(), Rounded()(X).argmax(1)
    plain = PGD(steps=10)(quantiser, X, y, threat=Linf(0.3))
    assert plain.flat.sum() == plain.backwards.sum()
    seen = PGD(steps=10)(Target(quantiser, views={"straight-through": NET}), X, y, threat=Linf(0.3))
    assert seen.flat.sum() == 0
    assert torch.equal(seen.success, quantiser(seen.x_adv).argmax(1) != y)
    assert seen.success.sum() > plain.success.sum()


def test_gradients_are_averaged_over_draws():
    class Noisy(nn.Module):
        def forward(self, x):
            return NET(x) + torch.randn(len(x), 3)

    (loss, _), result = ask(lambda p: p.loss_and_grad(p.x), target=Target(Noisy(), draws=64))
    assert result.backwards.tolist() == [64] * 6
    exact = torch.stack([-nn.functional.cross_entropy(NET(X) + torch.randn(6, 3), Y, reduction="none") for _ in range(4000)])
    assert ((loss - exact.mean(0)).abs() < 4 * exact.std(0) / 8).all()


def test_a_model_that_writes_to_its_input_harms_nobody():
    class Writes(nn.Module):
        def forward(self, x):
            return NET(x.mul_(2).sub_(1))

    before = X.clone()
    result = PGD(steps=3)(Writes(), X, Y, threat=Linf(0.1), keep="last")
    assert torch.equal(X, before)
    assert torch.equal(result.success, NET(result.x_adv * 2 - 1).argmax(1) != Y)


def test_an_example_may_be_named_several_times():
    """Two candidates for each example at once: the better one is kept, in either order, and both are counted."""
    half, full = X, (X + 0.1).clamp(0, 1)
    loss = {name: -nn.functional.cross_entropy(NET(x), Y, reduction="none") for name, x in (("half", half), ("full", full))}
    best = torch.where((loss["half"] < loss["full"]).reshape(-1, 1, 1, 1), half, full)
    for order in ((half, full), (full, half)):

        def question(problem, order=order):
            twice = torch.arange(6).repeat_interleave(2)
            problem[twice].loss(torch.stack(order, 1).flatten(0, 1))
            return problem._best.best.x_adv.clone(), problem._best.best.success.clone()

        (kept, found), result = ask(question, keep="best")
        wrong = torch.stack([NET(x).argmax(1) != Y for x in order])
        assert torch.equal(found, wrong.any(0))
        same = wrong[0] == wrong[1]
        assert torch.equal(kept[same], best[same])
        assert result.forwards.tolist() == [4] * 6  # two candidates, the last iterate and the verdict


def test_rows_may_be_given_by_mask_and_slice():
    def question(problem):
        mask = torch.tensor([True, False] * 3)
        return problem[mask].x, problem[1:3].x

    (masked, sliced), _ = ask(question)
    assert torch.equal(masked, X[::2])
    assert torch.equal(sliced, X[1:3])
