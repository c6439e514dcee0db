"""A small sound network with its examples, and a way to run code inside an attack, for the tests of `Standard`."""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from robustkit import Attack, Goal, Linf
from robustkit.attacks.standard import attack_checks, gradient_checks

N, EPS = 24, 0.1


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).eval()


SOUND = net()
X = 0.2 + 0.6 * torch.rand(N, 1, 4, 4, generator=torch.Generator().manual_seed(1))
Y = SOUND(X).argmax(1)


@dataclass(frozen=True)
class Inside(Attack):
    """An attack that calls `body` with its problem and returns x."""

    body: object

    def run(self, problem):
        self.body(problem)
        return problem.x


def run_inside(body, model=SOUND, threat=Linf(EPS), x=X, y=Y, **options):
    """The result of an attack that calls `body` with its problem."""
    return Inside(body)(model, x, y, threat=threat, **options)


def check_counts(result):
    return {check.name: (check.hits, check.of) for check in result.checks}


def names(messages):
    return {message.name for message in messages}


def audit_flags(result):
    """The names of the flags, without those that any attack can raise."""
    return names(result.flags) - {"flat-gradients", "train-mode", "unsteady-target", "undeclared-randomness"}


def all_rows(problem):
    return torch.arange(len(problem))


def check_gradients(problem):
    gradient_checks.check_gradients(problem, all_rows(problem))


def check_derivative(problem):
    gradient_checks.check_derivative(problem, all_rows(problem))


def check_monotonicity(problem):
    attack_checks.check_monotonicity(problem, all_rows(problem))


def check_unbounded(problem):
    attack_checks.check_unbounded(problem, all_rows(problem))


def check_gradient_free(problem):
    attack_checks.check_gradient_free(problem, 1.0)


def hard_and_easy(hard):
    """A model that classifies images as bright by their first pixel; a step of 0.2 brightens all but the first `hard` ones."""
    x = torch.full((N, 1, 4, 4), 0.4)
    x[:hard] = 0.1

    def bright(z):
        return torch.stack([torch.zeros(len(z)), z[:, 0, 0, 0] - 0.5], 1)

    return bright, x, torch.zeros(N, dtype=torch.int64)


@dataclass(frozen=True)
class Exceed(Goal):
    """One column of the output above the reference, (N,)."""

    column: int

    def loss(self, out, ref):
        return ref - out[:, self.column]

    def success(self, out, ref):
        return out[:, self.column] > ref


@dataclass(frozen=True)
class AnyOf(Goal):
    """Column 0 above the reference, or column 1 above the reference plus `more`, or column 0 above twice the reference."""

    more: float = 0.5

    def parts(self, out, ref):
        return [(Exceed(0), ref), (Exceed(1), ref + self.more), (Exceed(0), 2 * ref)]

    def loss(self, out, ref):
        return torch.stack([part.loss(out, part_ref) for part, part_ref in self.parts(out, ref)]).amin(0)

    def success(self, out, ref):
        return torch.stack([part.success(out, part_ref) for part, part_ref in self.parts(out, ref)]).any(0)


class Masked(nn.Module):
    """The sound network between two functions."""

    def __init__(self, before=lambda x: x, after=lambda out: out):
        super().__init__()
        self.net, self.before, self.after = copy.deepcopy(SOUND), before, after

    def forward(self, x):
        return self.after(self.net(self.before(x)))


class Flip(torch.autograd.Function):
    """The identity, with a derivative of minus one."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return -grad


FLIPPED = Masked(before=Flip.apply)
