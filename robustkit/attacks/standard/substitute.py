"""Transfer attacks: a small network is trained on the outputs of a model, and its adversarial examples are tried on the model.

The substitute is smooth where the model is not: high-frequency components, steps, noise and flat outputs are averaged out.
Every goal is supported, since the output of the substitute has the form of the model's output.
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
from robustkit.attacks._descent import cosine_decay, gradient_descent
from robustkit.attacks.standard.cascade import descend
from robustkit.goals import Goal
from robustkit.losses import margin
from robustkit.problem import Problem
from robustkit.threats import L1, Pixels

__all__ = [
    "SubstituteConfig",
    "SubstituteModel",
    "flatten_output",
    "query_model",
    "random_tiles",
    "train_substitute",
    "transfer_attack",
    "unflatten_output",
]

_TILE_SIDES = (1, 2, 4, 7)  # in pixels
_MAX_VALUES = 2**26  # of all training points together: 256 MiB of float32
_FEATURE_SIDE = 14  # approximate height and width of an image after the first convolution
_NEIGHBOURS = 8  # further training points around each adversarial example of the substitute
_SUBSTITUTE_ATTACK_STEPS = 20  # of a descent on the substitute
_MAX_PARTS = 4  # parts of the goal, likeliest first, that the descents aim at
_MAX_OUTPUTS = 4096  # models with more outputs per example get no substitute
_DRAWS = 100_000  # random draws reserved for one attempt
_MIN_EXAMPLES, _MAX_FACTOR = 64, 6  # with fewer examples, each is queried at more points, up to this factor


@final
@dataclass(frozen=True)
class SubstituteConfig:
    """How a substitute model is trained and attacked.

    Attributes:
        points: Number of queries around each example before the first attack.
        steps: Number of training steps in each round.
        batch: Batch size of a training step. Fewer steps with larger batches are cheaper where overhead dominates.
        learning_rate: Learning rate of Adam.
        rounds: Number of rounds, each of training, attacks on the substitute, and queries of the model.
        attacks_per_round: Number of adversarial examples per example and round.
        min_examples: If fewer examples are unsolved, solved ones are queried too, up to this number in all: with few
            queries the substitute model is weak.
        convolutional: Use convolutions for images instead of two hidden layers.
        query_every_step: Query the model at each step of a descent on the substitute, instead of at its end only.
    """

    points: int
    steps: int
    batch: int = 64
    learning_rate: float = 2e-3
    rounds: int = 1
    attacks_per_round: int = 2
    min_examples: int = 0
    convolutional: bool = False
    query_every_step: bool = False


def random_tiles(problem: Problem, draw: int) -> Tensor:
    """Random points that spend the whole budget, (N, *S): square tiles of 1 to 7 pixels, each channel up or down.

    The last two axes of the data are height and width. For L1 and Pixels the points are those of `Problem.start`.
    """
    x, threat = problem.x, problem.threat
    if isinstance(threat, L1 | Pixels):
        return problem.start(3000 + draw)
    height, width = (1, 1, *x.shape[1:])[-2:]
    side = _TILE_SIDES[draw % len(_TILE_SIDES)]
    channels, rows, columns = math.prod(x.shape[1:]) // max(1, height * width), -(-height // side), -(-width // side)
    tiles = problem.noise("scattered", draw).uniform(channels, rows, columns)
    row, column = (torch.arange(size, device=x.device) // side for size in (height, width))
    signs = 1 - 2 * (tiles < 0.5).to(x)
    return threat.steepest(signs.to(x.device)[:, :, row][:, :, :, column].reshape(x.shape), x)


def flatten_output(out: Any) -> Tensor:
    """An output, one tensor (N, ...) or a tuple of tensors, as one float32 matrix (N, K)."""
    parts = out if isinstance(out, tuple | list) else (out,)
    return torch.cat([flatten_rows(part.detach()).float() for part in parts], 1)


def unflatten_output(rows: Tensor, like: Any) -> Any:
    """The inverse of `flatten_output`: a matrix (N, K) in the form of the output `like`."""
    if isinstance(like, Tensor):
        return rows.reshape(len(rows), *like.shape[1:])
    sizes = [math.prod(part.shape[1:]) for part in like]
    parts = zip(torch.split(rows, sizes, 1), like, strict=True)
    return tuple(unflatten_output(columns, part) for columns, part in parts)


@final
class SubstituteModel:
    """A small network trained on the outputs of a model by least squares; outputs are scaled to unit variance.

    Source: Papernot et al. 2017, "Practical black-box attacks against machine learning", section 4
        (https://arxiv.org/abs/1602.02697): the substitute is retrained on the points where it was attacked. There it is
        trained on classes with the cross-entropy; here on whatever output the goal reads, with the squared error, which
        needs no knowledge of the meaning of the output.
    """

    def __init__(self, x: Tensor, like: Any, noise: Noise, *, convolutional: bool) -> None:
        """An untrained network.

        Args:
            x: Examples, (N, *S); their mean is subtracted from inputs.
            like: The output of the model for `x`.
            noise: Source of the random weights and mini-batches.
            convolutional: Use convolutions for images of at least 8 by 8 pixels.
        """
        self._like, self._noise = like, noise
        self._rounds = 0
        self._points, self._outputs = x[:0], torch.zeros(0, flatten_output(like).shape[1], device=x.device)
        self._input_mean = x.mean(0)
        with fork_rng(noise.key):
            build = _cnn if convolutional and x.dim() == 4 and min(x.shape[2:]) >= 8 else _mlp
            self._net = build(x, self._outputs.shape[1]).to(x)
        self._optimizer = Adam(list(self._net.parameters()))
        self._output_mean, self._output_std = torch.zeros(2)

    def add_data(self, points: Tensor, outputs: Tensor) -> None:
        """Add training data: outputs (M, K) at points (M, *S). Rows with NaN or infinities are ignored."""
        finite = outputs.isfinite().all(1)
        self._points, self._outputs = torch.cat([self._points, points[finite]]), torch.cat([self._outputs, outputs[finite]])

    def fit(self, config: SubstituteConfig) -> None:
        """Train for a round on random mini-batches, which are the same for the same noise."""
        if not len(self._outputs):
            return
        if not self._rounds:
            self._output_mean = self._outputs.mean(0)
            self._output_std = (self._outputs - self._output_mean).square().mean().sqrt().clamp(min=1e-12)
        self._rounds += 1
        wanted = ((self._outputs - self._output_mean) / self._output_std).to(self._points)
        generator = torch.Generator().manual_seed(self._noise.at("lesson", self._rounds).key % 2**63)
        for _ in range(config.steps):
            rows = torch.randint(len(wanted), (min(config.batch, len(wanted)),), generator=generator).to(wanted.device)
            loss = (self._net(self._points[rows] - self._input_mean) - wanted[rows]).square().mean()
            self._optimizer.step(loss, config.learning_rate)

    def __call__(self, x: Tensor) -> Any:
        """The predicted output of the model, in its form and units."""
        return unflatten_output(self._net(x - self._input_mean) * self._output_std + self._output_mean, self._like)


@final
class Adam:
    """Kingma & Ba 2015, algorithm 1 (https://arxiv.org/abs/1412.6980); torch's loads a compiler on first use, for 1.5 s."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self._weights, self._steps = weights, 0
        self._first, self._second = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))

    def step(self, loss: Tensor, learning_rate: float) -> None:
        """Make one step on a loss, which changes each weight by about the learning rate."""
        self._steps += 1
        grads = torch.autograd.grad(loss, self._weights)
        unbiased = learning_rate * math.sqrt(1 - 0.999**self._steps) / (1 - 0.9**self._steps)
        with torch.no_grad():
            for weight, grad, first, second in zip(self._weights, grads, self._first, self._second, strict=True):
                first.lerp_(grad, 0.1)
                second.lerp_(grad.square(), 0.001)
                weight.addcdiv_(first, second.sqrt().add_(1e-8), value=-unbiased)


def _mlp(x: Tensor, outputs: int) -> nn.Module:
    """A network with two hidden layers."""
    inputs = math.prod(x.shape[1:])
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, outputs)
    )


def _cnn(x: Tensor, outputs: int) -> nn.Module:
    """A network with two convolutions and one hidden layer, for images (N, C, H, W)."""
    stride = max(2, round(max(x.shape[2:]) / _FEATURE_SIDE))
    first = nn.Conv2d(x.shape[1], 16, 2 * stride, stride, padding=stride // 2)
    features = nn.Sequential(first, nn.ReLU(), nn.Conv2d(16, 24, 4, stride=2, padding=1), nn.ReLU(), nn.Flatten())
    size = features(torch.zeros(1, *x.shape[1:])).shape[1]
    return nn.Sequential(features, nn.Linear(size, 100), nn.ReLU(), nn.Linear(100, outputs))


def query_model(problem: Problem, rows: Tensor, points: Tensor) -> Any:
    """The output of the deployed function at points (M, *S) of the examples `rows` (M,), in batches of the allowed size."""
    batches = zip(torch.split(rows, problem.batch_size), torch.split(points, problem.batch_size), strict=True)
    outs = [problem[batch_rows].predict(x_adv) for batch_rows, x_adv in batches]
    if isinstance(outs[0], Tensor):
        return torch.cat(outs)
    return tuple(torch.cat(parts) for parts in zip(*outs, strict=True))


def train_substitute(problem: Problem, config: SubstituteConfig, attempt: int = 0) -> SubstituteModel | None:
    """Query the model around the unsolved examples, and collect the outputs as training data of a substitute.

    Successes among the queried points are kept. The substitute, and with it what a transfer attack finds for one example,
    depends on the whole batch.

    Args:
        problem: The examples.
        config: How the substitute is trained.
        attempt: Number of the attempt; each has its own random points.

    Returns:
        The substitute; None if no example is unsolved, or if the outputs are not tensors with one row per example or have
        more than 4,096 values each.
    """
    rows = _active_rows(problem)
    if not len(rows):
        return None
    like = problem[rows].predict(problem.x[rows])
    try:
        outputs = flatten_output(like)
    except (AttributeError, TypeError, RuntimeError):  # the output is not a tensor, or parts differ in length
        return None
    if outputs.shape[1] > _MAX_OUTPUTS or len(outputs) != len(rows):
        return None
    noise = problem.common_noise("copy", int(problem.ids[rows[0]]), attempt)
    substitute = SubstituteModel(problem.x[rows], like, noise, convolutional=config.convolutional)
    substitute.add_data(problem.x[rows], outputs)
    queried = max(len(rows), min(config.min_examples, len(problem)))
    points = max(config.points, min(_MAX_FACTOR * config.points, _MIN_EXAMPLES * config.points // queried))
    for number in range(min(points, _max_points(problem))):
        unsolved = _active_rows(problem)
        if not len(unsolved):
            break
        rows = _with_solved(problem, unsolved, config.min_examples)
        _query_and_add(substitute, problem, rows, _training_points(problem[rows], _DRAWS * attempt + number))
    return substitute


def transfer_attack(
    problem: Problem, substitute: SubstituteModel, config: SubstituteConfig, attempt: int = 0
) -> Iterator[Tensor]:
    """Attack the substitute and query the model at its adversarial examples; successes are kept.

    The attacks of a round share their batches; the outputs of the model at their end points are added to the training data.

    Args:
        problem: The examples.
        substitute: A substitute of the model.
        config: How the substitute is trained and attacked.
        attempt: Number of the attempt; each has its own random starts.

    Yields:
        The end points of each attack, (N, *S); x for examples that were not attacked.
    """
    neighbours = max(0, min(_NEIGHBOURS, _max_points(problem) // max(1, config.rounds * config.attacks_per_round) - 1))
    query_every_step = config.query_every_step and problem.early_stop
    for round_number in range(config.rounds):
        substitute.fit(config)
        rows = _active_rows(problem)
        if not len(rows):
            return
        numbers = range(round_number * config.attacks_per_round, (round_number + 1) * config.attacks_per_round)
        ends = _attack_substitute(problem, rows, substitute, numbers, attempt, query_every_step=query_every_step)
        _query_and_add(substitute, problem, rows.repeat(len(numbers)), torch.cat(ends))
        yield from (problem.x.index_copy(0, rows, points) for points in ends)
        for number, points in zip(numbers, ends, strict=True) if round_number + 1 < config.rounds else ():
            first = _first_draw(attempt, number)
            _sample_neighbours(substitute, problem, rows, points, range(first, first + neighbours))


def _first_draw(attempt: int, number: int) -> int:
    """The first of the hundred random draws of one attack on the substitute."""
    return _DRAWS * attempt + 5000 + 100 * number


def _sample_neighbours(substitute: SubstituteModel, problem: Problem, rows: Tensor, points: Tensor, draws: range) -> None:
    """Query points half a budget away from adversarial examples of the substitute, (M, *S), and add them as data."""
    active = torch.isin(rows, _active_rows(problem))
    rows, points = rows[active], points[active]
    for draw in draws if len(rows) else ():
        examples = problem[rows]
        neighbours = points + 0.5 * (random_tiles(examples, draw) - examples.x)
        _query_and_add(substitute, problem, rows, examples.threat.project(neighbours, examples.x))


def _max_points(problem: Problem) -> int:
    """Number of training points per example that fit into memory."""
    return max(4, _MAX_VALUES // max(1, problem.x.numel()))


def _attack_substitute(
    problem: Problem, rows: Tensor, substitute: SubstituteModel, numbers: range, attempt: int, *, query_every_step: bool
) -> list[Tensor]:
    """The end points of several descents on the substitute, (M, *S) each, in one batch.

    The descents start from random tiles and take turns in aiming at the likeliest parts of the goal. With `query_every_step`
    the model is queried at each step: a point may succeed on the model before it does on the substitute.
    """
    examples, repeated_rows = problem[rows], rows.repeat(len(numbers))
    x_adv = torch.cat([random_tiles(examples, _first_draw(attempt, number)) for number in numbers])
    goal, refs = _likeliest_parts(examples.goal.with_surrogate_loss(margin), substitute, examples)
    surrogate = problem.subproblem(repeated_rows, keep="last", fn=substitute)
    surrogate = surrogate.with_surrogate_loss(goal, torch.cat([refs[number % len(refs)] for number in numbers]))
    if not query_every_step:
        return list(torch.split(descend(surrogate, x_adv, _SUBSTITUTE_ATTACK_STEPS), len(rows)))

    def update(step: int, x_adv: Tensor, grad: Tensor) -> Tensor:
        fraction = 2 * cosine_decay(step, _SUBSTITUTE_ATTACK_STEPS)
        x_next = surrogate.threat.project(surrogate.threat.step(-grad, x_adv, surrogate.x, fraction), surrogate.x)
        batches = (torch.split(tensor, problem.batch_size) for tensor in (repeated_rows, x_next))
        for batch_rows, points in zip(*batches, strict=True):
            problem[batch_rows].success(points)
        return x_next

    return list(torch.split(gradient_descent(surrogate, x_adv, range(_SUBSTITUTE_ATTACK_STEPS), update), len(rows)))


@torch.no_grad()
def _likeliest_parts(goal: Goal, substitute: SubstituteModel, problem: Problem) -> tuple[Goal, list[Tensor]]:
    """The goal that the likeliest parts share, and their references (N, ...); the whole goal if they share none."""
    parts = goal.parts(substitute(problem.x), problem.ref)[:_MAX_PARTS]
    if not parts or any(part != parts[0][0] for part, _ in parts):
        return goal, [problem.ref]
    return parts[0][0], [ref for _, ref in parts]


def _training_points(problem: Problem, draw: int) -> Tensor:
    """Random tiles, (N, *S); for odd draws a point at a random share of the way from x."""
    tiles = random_tiles(problem, draw)
    if draw % 2 == 0:
        return tiles
    share = problem.noise("part", draw).uniform().to(problem.x)
    return problem.x + (tiles - problem.x) * as_rows(share, problem.x)


def _query_and_add(substitute: SubstituteModel, problem: Problem, rows: Tensor, points: Tensor) -> None:
    """Query the model at points (M, *S) of the examples `rows` (M,), and add the outputs to the training data."""
    if len(rows):
        substitute.add_data(points, flatten_output(query_model(problem, rows, points)))


def _with_solved(problem: Problem, rows: Tensor, min_examples: int) -> Tensor:
    """The examples `rows` and the first of the others, up to `min_examples` in all."""
    others = torch.ones_like(problem.unsolved)
    others[rows] = False
    return torch.cat([rows, others.nonzero().squeeze(1)[: max(0, min_examples - len(rows))]])


def _active_rows(problem: Problem) -> Tensor:
    """The indices of the unsolved examples; of all examples on a random target, where a success may be luck."""
    return (problem.unsolved if problem.early_stop else torch.ones_like(problem.unsolved)).nonzero().squeeze(1)
