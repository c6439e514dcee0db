"""Transfer: a small net is taught the answers of a model, attacked by its gradients, and its points are asked of the model.

The copy is smooth where the model is rough: fast waves, steps, noise and flat outputs are averaged away, and what is left is
what the answers have in common over the threat set. Any goal will do, since the copy answers in the shape of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from robustkit._engine.noise import Noise
from robustkit._engine.state_guard import fork_rng
from robustkit._engine.tensors import as_rows, flatten_rows
from robustkit.attacks._cosine import cosine
from robustkit.attacks.standard.cascade import descend
from robustkit.goals import Goal
from robustkit.losses import margin
from robustkit.problem import Problem
from robustkit.threats import L1, Pixels

__all__ = [
    "SubstituteConfig",
    "SubstituteModel",
    "asked",
    "flatten_output",
    "random_tiles",
    "train_substitute",
    "transfer_attack",
    "unflatten_output",
]

_TILES = (1, 2, 4, 7)  # pixels along the side of a tile of one colour
_NUMBERS = 2**26  # of all points together: a quarter of a gigabyte
_SIDE = 14  # to about so many places per axis the first convolution brings an image
_AROUND = 8  # further points around each that was found on the copy
_DESCENT = 20  # steps on the copy
_PARTS = 4  # of the goal, the likeliest ones, are gone for
_WIDEST = 4096  # outputs
_TURN = 100_000  # draws that one copy may use
_ENOUGH, _FEWEST = 64, 6  # examples: of fewer more is asked about each, as if there were so many, up to so many times as much


@final
@dataclass(frozen=True)
class SubstituteConfig:
    """How much effort goes into a copy.

    Attributes:
        points: Around each example that the model is asked about before the copy is attacked.
        steps: Of gradient descent in each round.
        batch: Answers that a step is taken on. Fewer steps on more of them cost less where a step costs its overhead.
        rate: The length of a step.
        rounds: Of attack, questions and further teaching.
        strikes: Points of the copy that the model is asked about in each round.
        company: Where fewer examples are left, solved ones are asked about too, so many in all: few teach a copy little.
        deep: Convolutions, for images, instead of two hidden layers.
        walk: The model is asked at each step of a descent on the copy, not only at its end.
    """

    points: int
    steps: int
    batch: int = 64
    rate: float = 2e-3
    rounds: int = 1
    strikes: int = 2
    min_examples: int = 0
    deep: bool = False
    walk: bool = False


def random_tiles(problem: Problem, draw: int) -> Tensor:
    """Rough points of the threat set that spend the whole budget, (N, *S): tiles of one to seven pixels, channels up or down.

    The last two axes of any data are height and width; where single places are what is paid for, places are drawn.
    """
    x, threat = problem.x, problem.threat
    if isinstance(threat, L1 | Pixels):
        return problem.start(3000 + draw)
    height, width = (1, 1, *x.shape[1:])[-2:]
    side = _TILES[draw % len(_TILES)]
    channels, tall, wide = math.prod(x.shape[1:]) // max(1, height * width), -(-height // side), -(-width // side)
    tiles = problem.noise("scattered", draw).uniform(channels, tall, wide)
    row, column = (torch.arange(size, device=x.device) // side for size in (height, width))
    signs = 1 - 2 * (tiles < 0.5).to(x)
    return threat.steepest(signs.to(x.device)[:, :, row][:, :, :, column].reshape(x.shape), x)


def flatten_output(out: Any) -> Tensor:
    """An output, one tensor (N, ...) or a tuple of such, as one matrix (N, K)."""
    parts = out if isinstance(out, tuple | list) else (out,)
    return torch.cat([flatten_rows(part.detach()).float() for part in parts], 1)


def unflatten_output(rows: Tensor, like: Any) -> Any:
    """A matrix (N, K) in the shape of the output `like`, which it was made of by `flattened`."""
    if isinstance(like, Tensor):
        return rows.reshape(len(rows), *like.shape[1:])
    sizes = [math.prod(part.shape[1:]) for part in like]
    return tuple(unflatten_output(part, one) for part, one in zip(torch.split(rows, sizes, 1), like, strict=True))


@final
class SubstituteModel:
    """A small net that is taught the answers of a model: by least squares, in units in which they vary by one.

    Source: Papernot et al. 2017, "Practical black-box attacks against machine learning", section 4
        (https://arxiv.org/abs/1602.02697): the copy is taught anew at the points where it was attacked. There it sees classes;
        here it sees whatever the goal reads, and squares stand for the cross-entropy, so that it need not know what that is.
    """

    def __init__(self, x: Tensor, like: Any, noise: Noise, *, deep: bool) -> None:
        self._like, self._noise = like, noise
        self._lessons = 0
        self._points, self._told = x[:0], torch.zeros(0, flatten_output(like).shape[1], device=x.device)
        self._middle = x.mean(0)
        with fork_rng(noise.key):
            net = _convolutions if deep and x.dim() == 4 and min(x.shape[2:]) >= 8 else _layers
            self._net = net(x, self._told.shape[1]).to(x)
        self._adam = Adam(list(self._net.parameters()))
        self._mean, self._spread = torch.zeros(2)

    def see(self, points: Tensor, told: Tensor) -> None:
        """Take note of answers (M, K) at points (M, *S); those that are no numbers teach nothing."""
        good = told.isfinite().all(1)
        self._points, self._told = torch.cat([self._points, points[good]]), torch.cat([self._told, told[good]])

    def learn(self, teaching: SubstituteConfig) -> None:
        """As many steps of Adam as are taught, on random answers, always the same ones."""
        if not len(self._told):
            return
        if not self._lessons:
            self._mean = self._told.mean(0)
            self._spread = (self._told - self._mean).square().mean().sqrt().clamp(min=1e-12)
        self._lessons += 1
        wanted = ((self._told - self._mean) / self._spread).to(self._points)
        draw = torch.Generator().manual_seed(self._noise.at("lesson", self._lessons).key % 2**63)
        for _ in range(teaching.steps):
            some = torch.randint(len(wanted), (min(teaching.batch, len(wanted)),), generator=draw).to(wanted.device)
            loss = (self._net(self._points[some] - self._middle) - wanted[some]).square().mean()
            self._adam.step(loss, teaching.rate)

    def __call__(self, x: Tensor) -> Any:
        """What the model would say, in its own shape and units."""
        return unflatten_output(self._net(x - self._middle) * self._spread + self._mean, self._like)


@final
class Adam:
    """Kingma & Ba 2015, algorithm 1 (https://arxiv.org/abs/1412.6980); torch's own loads a compiler at first, for 1.5 s."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self._weights, self._count = weights, 0
        self._first, self._second = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))

    def step(self, loss: Tensor, rate: float) -> None:
        """One step down, of about this length in each weight."""
        self._count += 1
        grads = torch.autograd.grad(loss, self._weights)
        unbiased = rate * math.sqrt(1 - 0.999**self._count) / (1 - 0.9**self._count)
        with torch.no_grad():
            for weight, grad, first, second in zip(self._weights, grads, self._first, self._second, strict=True):
                first.lerp_(grad, 0.1)
                second.lerp_(grad.square(), 0.001)
                weight.addcdiv_(first, second.sqrt().add_(1e-8), value=-unbiased)


def _layers(x: Tensor, outputs: int) -> nn.Module:
    inputs = math.prod(x.shape[1:])
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, outputs)
    )


def _convolutions(x: Tensor, outputs: int) -> nn.Module:
    stride = max(2, round(max(x.shape[2:]) / _SIDE))
    first = nn.Conv2d(x.shape[1], 16, 2 * stride, stride, padding=stride // 2)
    front = nn.Sequential(first, nn.ReLU(), nn.Conv2d(16, 24, 4, stride=2, padding=1), nn.ReLU(), nn.Flatten())
    size = front(torch.zeros(1, *x.shape[1:])).shape[1]
    return nn.Sequential(front, nn.Linear(size, 100), nn.ReLU(), nn.Linear(100, outputs))


def asked(problem: Problem, rows: Tensor, points: Tensor) -> Any:
    """What the deployed function says at points (M, *S) of the examples `rows` (M,), in as many batches as it takes."""
    parts = zip(torch.split(rows, problem.batch_size), torch.split(points, problem.batch_size), strict=True)
    outs = [problem[some].predict(where) for some, where in parts]
    if isinstance(outs[0], Tensor):
        return torch.cat(outs)
    return tuple(torch.cat(parts) for parts in zip(*outs, strict=True))


def train_substitute(problem: Problem, teaching: SubstituteConfig, turn: int = 0) -> SubstituteModel | None:
    """A copy of the model that knows its answers around the examples that are open; None of a model with no such answers.

    Where these are few it learns from solved ones too, the first ones. Each `turn` has points of its own. What succeeds among
    the rough points that the model is asked about is kept. What is found on a copy for one example depends on its company.
    """
    rows = _left(problem)
    if not len(rows):
        return None
    like = problem[rows].predict(problem.x[rows])
    try:
        told = flatten_output(like)
    except (AttributeError, TypeError, RuntimeError):  # no tensors with a row each
        return None
    if told.shape[1] > _WIDEST or len(told) != len(rows):
        return None
    noise = problem.common_noise("copy", int(problem.ids[rows[0]]), turn)
    copy = SubstituteModel(problem.x[rows], like, noise, deep=teaching.deep)
    copy.see(problem.x[rows], told)
    asked_about = max(len(rows), min(teaching.min_examples, len(problem)))
    many = max(teaching.points, min(_FEWEST * teaching.points, _ENOUGH * teaching.points // asked_about))
    for number in range(min(many, _room(problem))):
        left = _left(problem)
        if not len(left):
            break
        rows = _with_solved(problem, left, teaching.min_examples)
        _query(copy, problem, rows, _rough(problem[rows], _TURN * turn + number))
    return copy


def transfer_attack(problem: Problem, copy: SubstituteModel, teaching: SubstituteConfig, turn: int = 0) -> Iterator[Tensor]:
    """The points (N, *S) that are found on a copy and asked of the model, one after the other; what succeeds is kept.

    The strikes of a round go side by side, before the copy is taught what came of them.
    """
    around = max(0, min(_AROUND, _room(problem) // max(1, teaching.rounds * teaching.strikes) - 1))
    for lesson in range(teaching.rounds):
        copy.learn(teaching)
        rows = _left(problem)
        if not len(rows):
            return
        numbers = range(lesson * teaching.strikes, (lesson + 1) * teaching.strikes)
        found = _descend_on_substitute(problem, rows, copy, numbers, turn, walk=teaching.walk and problem.early_stop)
        _query(copy, problem, rows.repeat(len(numbers)), torch.cat(found))
        yield from (problem.x.index_copy(0, rows, points) for points in found)
        for number, points in zip(numbers, found, strict=True) if lesson + 1 < teaching.rounds else ():
            first = _draw(turn, number)
            _look_around(copy, problem, rows, points, range(first, first + around))


def _draw(turn: int, number: int) -> int:
    """The first of a hundred random draws that belong to one strike."""
    return _TURN * turn + 5000 + 100 * number


def _look_around(copy: SubstituteModel, problem: Problem, rows: Tensor, found: Tensor, numbers: range) -> None:
    """Tell the copy of points half a budget away from those that were found on it."""
    still = torch.isin(rows, _left(problem))
    rows, found = rows[still], found[still]
    for number in numbers if len(rows) else ():
        some = problem[rows]
        _query(copy, problem, rows, some.threat.project(found + 0.5 * (random_tiles(some, number) - some.x), some.x))


def _room(problem: Problem) -> int:
    """How many points of each example fit into memory."""
    return max(4, _NUMBERS // max(1, problem.x.numel()))


def _descend_on_substitute(
    problem: Problem, rows: Tensor, copy: SubstituteModel, numbers: range, turn: int, *, walk: bool
) -> list[Tensor]:
    """Where descents on the copy end, side by side, each from a rough point: in turn towards the likeliest parts of the goal.

    With `walk` the model is asked at every step: what has not gone far on the copy may have gone far enough on the model.
    """
    some, everyone = problem[rows], rows.repeat(len(numbers))
    fake = problem.subproblem(everyone, keep="last", fn=copy)
    x_adv = torch.cat([random_tiles(some, _draw(turn, number)) for number in numbers])
    goal, refs = _ways(some.goal.with_surrogate(margin), copy, some)
    fake = fake.with_surrogate(goal, torch.cat([refs[number % len(refs)] for number in numbers]))
    if not walk:
        return list(torch.split(descend(fake, x_adv, _DESCENT), len(rows)))
    for step in range(_DESCENT):
        grad = fake.loss_and_grad(x_adv)[1]
        fraction = 2 * cosine(step, _DESCENT)
        x_adv = fake.threat.project(fake.threat.step(-grad, x_adv, fake.x, fraction), fake.x)
        for part, where in zip(*(torch.split(each, problem.batch_size) for each in (everyone, x_adv)), strict=True):
            problem[part].success(where)
    return list(torch.split(x_adv, len(rows)))


@torch.no_grad()
def _ways(goal: Goal, copy: SubstituteModel, problem: Problem) -> tuple[Goal, list[Tensor]]:
    """A goal that is one of the likeliest parts, by its reference, and these references; if there is none such, the whole."""
    parts = goal.parts(copy(problem.x), problem.ref)[:_PARTS]
    if not parts or any(part != parts[0][0] for part, _ in parts):
        return goal, [problem.ref]
    return parts[0][0], [ref for _, ref in parts]


def _rough(problem: Problem, number: int) -> Tensor:
    """Rough points, every other one a random part of the way out."""
    end = random_tiles(problem, number)
    if number % 2 == 0:
        return end
    part = problem.noise("part", number).uniform().to(problem.x)
    return problem.x + (end - problem.x) * as_rows(part, problem.x)


def _query(copy: SubstituteModel, problem: Problem, rows: Tensor, points: Tensor) -> None:
    if len(rows):
        copy.see(points, flatten_output(asked(problem, rows, points)))


def _with_solved(problem: Problem, rows: Tensor, min_examples: int) -> Tensor:
    """These examples, and so many solved ones that there are `company` in all."""
    others = torch.ones_like(problem.unsolved)
    others[rows] = False
    return torch.cat([rows, others.nonzero().squeeze(1)[: max(0, min_examples - len(rows))]])


def _left(problem: Problem) -> Tensor:
    """The examples that are worth a question: on a random target all of them, since a success may be luck."""
    everyone = torch.ones_like(problem.unsolved)
    return (problem.unsolved if problem.early_stop else everyone).nonzero().squeeze(1)
