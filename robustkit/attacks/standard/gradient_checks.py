"""The checks of the audit that run no attack: outputs, input range, and the gradient against finite differences.

Each check queries a sample of the examples and records in how many of how many cases it was positive. Points that reach the
goal on the way count as successes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustkit._engine.output_checks import are_probabilities, non_finite_rows
from robustkit._engine.state_guard import fork_rng
from robustkit._engine.tensors import abs_max, as_rows, flatten_rows
from robustkit.losses import margin
from robustkit.problem import Problem
from robustkit.threats import L1, Pixels, Threat

__all__ = ["check_consistency", "check_derivative", "check_gradients", "check_input_range", "check_outputs", "sample_rows"]

_MIN_COSINE = 0.9  # between gradient and finite differences; below, the gradient is misleading
_FAINT = 0.01  # ratio of gradient and finite differences below which the gradient is lost to rounding
_DIRECTIONS = 5  # random directions along which the gradient is compared
_DOUBLE_DIRECTIONS = 3  # in float64, where only rounding may differ
_SCALES = (1 / 30, 1 / 3)  # shortest and longest finite difference, in budgets
_JITTER = 0.1  # distance of the tested points from x, as a share of the way to a random point of the threat set
_DOUBLE_SCALE = 1e-6  # finite difference in float64, in budgets
_SATURATED = 80.0  # difference of logits beyond which float32 probabilities have no gradient
_TOLERANCE = 1e-3  # difference between repeated outputs, relative to their range
_USUAL_RANGES = ((0.0, 1.0), (0.0, 255.0), (-1.0, 1.0))  # of images
_MAX_NORMALISED = 20.0  # largest absolute value of a normalised image


def sample_rows(problem: Problem, purpose: str, share: float, *, unsolved_only: bool = True) -> Tensor:
    """The indices of a random sample of the (unsolved) examples; each is drawn independently of the others."""
    drawn = (problem.noise("chosen", purpose).uniform() < share).to(problem.unsolved.device)
    return (problem.unsolved & drawn if unsolved_only else drawn).nonzero().squeeze(1)


def check_outputs(problem: Problem) -> None:
    """Check for undefined and saturated outputs, probabilities, and outputs that change when a query is repeated."""
    out = problem.predict(problem.x)
    if isinstance(out, Tensor) and out.dim() == 2 and out.shape[1] > 1:
        _check_logits(problem, out)
    check_consistency(problem, out)


def _check_logits(problem: Problem, out: Tensor) -> None:
    """Record how many rows of logits (N, K) are undefined, saturated or probabilities."""
    n = len(out)
    problem.record_check("undefined-outputs", non_finite_rows(out).sum(), n, 0.0)
    top = out.topk(2, 1).values
    one_hot = (out.amin(1) == top[:, 1]) & (out.shape[1] > 2)
    problem.record_check("saturated-outputs", (one_hot | (top.diff(dim=1).abs()[:, 0] > _SATURATED)).sum(), n)
    problem.record_check("probabilities", (are_probabilities(out) & ~one_hot).sum(), n)


def check_consistency(problem: Problem, out: object = None) -> None:
    """Check whether outputs are the same in a repeated query and in another batch; of a random model, with the same seed.

    Args:
        problem: The examples.
        out: The outputs at x if they are known already.
    """
    if problem.stochastic:
        _check_seeded_noise(problem)
        return
    first = _output_rows(problem.predict(problem.x) if out is None else out)
    again = _output_rows(problem.predict(problem.x))
    half = torch.arange(len(problem), device=first.device).flip(0)[: max(1, len(problem) // 2)]
    in_half = _output_rows(problem[half].predict(problem.x[half]))
    unsteady = _differ(first, again)
    problem.record_check("unsteady-answers", unsteady.sum(), len(problem), 0.0)
    differs_in_half = _differ(first[half], in_half)
    problem.record_check("batch-dependent", (differs_in_half & ~unsteady[half]).sum(), len(half), 0.02)


def _check_seeded_noise(problem: Problem) -> None:
    """Check whether a random model returns the same outputs with the same seed, without which no run is repeatable."""
    outs = []
    for _ in range(2):
        with fork_rng(problem.noise("repeat").key):
            outs.append(_output_rows(problem.predict(problem.x)))
    problem.record_check("unseeded-noise", _differ(*outs).sum(), len(problem))


def _differ(first: Tensor, second: Tensor) -> Tensor:
    """Which rows differ by more than rounding, (N, K), (N, K) -> (N,) bool."""
    value_range = (first.amax(1) - first.amin(1)).clamp(min=torch.finfo(first.dtype).tiny)
    return (first - second).abs().amax(1) > _TOLERANCE * value_range


def _output_rows(out: object) -> Tensor:
    """The first tensor of an output as a float32 matrix (N, K) without NaN and infinities."""
    out = out[0] if isinstance(out, tuple | list) else out
    assert isinstance(out, Tensor)
    return flatten_rows(out.detach()).float().nan_to_num()


def check_input_range(problem: Problem) -> None:
    """Check whether inputs look normalised: by bounds that are unusual for images, or without bounds by the values."""
    bounds, x = problem.threat.bounds, problem.x
    if bounds is not None:
        problem.record_check("unusual-range", bounds not in _USUAL_RANGES, 1)
    elif x.dim() == 4 and len(x):
        low, high = flatten_rows(x).amin(1), flatten_rows(x).amax(1)
        normalised = (low < -1) | ((low < 0) & (high > 1))
        problem.record_check("unusual-range", (normalised & (abs_max(x) < _MAX_NORMALISED)).sum(), len(x))


def check_gradients(problem: Problem, rows: Tensor) -> None:
    """Check whether the gradient of the margin predicts its changes over steps of the attack's size, and is not faint."""
    low, high = _SCALES
    scales = [low * (high / low) ** (number / (_DIRECTIONS - 1)) for number in range(_DIRECTIONS)]
    misleading, faint = _compare_gradients(problem.fresh_copy("last")[rows], scales)
    problem.record_check("gradients-disagree", misleading, len(rows))
    problem.record_check("faint-gradients", faint, len(rows))


def check_derivative(problem: Problem, rows: Tensor) -> None:
    """Check in float64 whether the gradient is the derivative; skipped if the model cannot be converted."""
    double = problem.in_double() if len(rows) else None
    if double is None or problem.stochastic:
        return
    try:
        hits = _compare_gradients(double[rows], [_DOUBLE_SCALE] * _DOUBLE_DIRECTIONS)[0]
    except RuntimeError:  # a model may convert to float32 inside
        return
    problem.record_check("small-steps-disagree", hits, len(rows))


def _compare_gradients(problem: Problem, scales: list[float]) -> tuple[Tensor, Tensor]:
    """The numbers of gradients that disagree with central differences along random directions, and of faint gradients.

    Args:
        problem: The examples.
        scales: The length of each difference in budgets, one direction each.
    """
    if not len(problem):
        return torch.zeros(()), torch.zeros(())
    problem = problem.with_surrogate_loss(problem.goal.with_surrogate_loss(margin), problem.ref)
    threat = problem.threat
    moves = [_random_move(problem, number, scale) for number, scale in enumerate(scales)]
    # Near x, where robustness is claimed, but not at x, where constant backgrounds have ties; further away even sound models
    # are too curved.
    x_adv = problem.x + _JITTER * (problem.start(1000) - problem.x)
    x_adv = _shift_inside(threat, x_adv, torch.stack([abs_max(move) for move in moves]).amax(0))
    key = problem.noise("probe").key
    with fork_rng(key):
        _, grad = problem.loss_and_grad(x_adv)
    ends = [end for move in moves for end in (x_adv + move, x_adv - move)]
    losses = _losses_at(problem, ends, key)
    length = torch.as_tensor(scales, dtype=torch.float64, device=x_adv.device)
    slopes = (losses[:, ::2] - losses[:, 1::2]) / (2 * length)
    predicted = torch.stack([(flatten_rows(grad).double() * flatten_rows(move).double()).sum(1) for move in moves], 1) / length
    cosine = (slopes * predicted).sum(1) / (slopes.norm(dim=1) * predicted.norm(dim=1))
    size = predicted.norm(dim=1)  # zero gradients are not faint: they are counted as flat
    return (~(cosine >= _MIN_COSINE)).sum(), ((size > 0) & (size < _FAINT * slopes.norm(dim=1))).sum()


def _losses_at(problem: Problem, points: list[Tensor], key: int) -> Tensor:
    """The losses at several points of each example, (N, M) float64; a random model gets the same noise at each point."""
    at_once = 1 if problem.stochastic else max(1, problem.batch_size // len(problem))
    rows, columns = torch.arange(len(problem), device=problem.x.device), []
    for first in range(0, len(points), at_once):
        chunk = points[first : first + at_once]
        with fork_rng(key):
            losses = problem[rows.repeat(len(chunk))].loss(torch.cat(chunk))
        columns += list(losses.double().reshape(len(chunk), -1))
    return torch.stack(columns, 1)


def _random_move(problem: Problem, number: int, scale: float) -> Tensor:
    """A random step of each example with a length of `scale` budgets, (N, *S)."""
    noise = problem.noise("probe", number).normal(*problem.x.shape[1:]).to(problem.x)
    if type(problem.threat) in (Pixels, L1):  # their steps would change hardly anything, or too much
        return noise.sign() * scale / 10
    zero = torch.zeros_like(problem.x)
    return problem.threat.move(noise, zero, zero, scale * problem.threat.budget)


def _shift_inside(threat: Threat, x_adv: Tensor, clearance: Tensor) -> Tensor:
    """`x_adv` moved so that every coordinate is at least `clearance`, (N,), away from the bounds of the box."""
    if threat.bounds is None:
        return x_adv
    low, high = threat.bounds
    space = as_rows(clearance.clamp(max=(high - low) / 2), x_adv)
    assert isinstance(space, Tensor)
    return torch.minimum(torch.maximum(x_adv, low + space), high - space)
