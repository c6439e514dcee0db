"""A small sound net with its examples, and a way to ask questions from inside of an attack, for the tests of `Standard`."""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from robustkit import Attack, Goal, Linf
from robustkit.attacks.standard import attack_checks as trials
from robustkit.attacks.standard import gradient_checks as probes

N, EPS = 24, 0.1


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).eval()


SOUND = net()
X = 0.2 + 0.6 * torch.rand(N, 1, 4, 4, generator=torch.Generator().manual_seed(1))
Y = SOUND(X).argmax(1)


@dataclass(frozen=True)
class Ask(Attack):
    """The inside of an attack, seen from a test."""

    question: object

    def run(self, problem):
        self.question(problem)
        return problem.x


def ask(question, model=SOUND, threat=Linf(EPS), x=X, y=Y, **options):
    return Ask(question)(model, x, y, threat=threat, **options)


def seen(result):
    return {one.name: (one.hits, one.of) for one in result.checks}


def names(messages):
    return {message.name for message in messages}


def raised(result):
    return names(result.flags) - {"flat-gradients", "train-mode", "unsteady-target", "undeclared-randomness"}  # no probe


def everyone(problem):
    return torch.arange(len(problem))


def agreement(problem):
    probes.agreement(problem, everyone(problem))


def small_steps(problem):
    probes.small_steps(problem, everyone(problem))


def raw_runs(problem):
    trials.raw_runs(problem, everyone(problem))


def unbounded(problem):
    trials.unbounded(problem, everyone(problem))


def survivors(problem):
    trials.survivors(problem, 1.0)


def hard_and_easy(hard):
    """A model that calls images bright by their first pixel; a step of 0.2 makes all bright but the `hard` ones."""
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
    """Column 0 above the reference, or column 1 above somewhat more, or column 0 above twice as much."""

    more: float = 0.5

    def parts(self, out, ref):
        return [(Exceed(0), ref), (Exceed(1), ref + self.more), (Exceed(0), 2 * ref)]

    def loss(self, out, ref):
        return torch.stack([part.loss(out, wanted) for part, wanted in self.parts(out, ref)]).amin(0)

    def success(self, out, ref):
        return torch.stack([part.success(out, wanted) for part, wanted in self.parts(out, ref)]).any(0)


class Masked(nn.Module):
    """A net behind one function and in front of another."""

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
