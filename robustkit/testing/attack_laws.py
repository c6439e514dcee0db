"""The laws that every attack must obey."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from robustkit._engine.best_so_far import Keep
from robustkit._engine.state_guard import random_state
from robustkit.attack import Attack
from robustkit.attacks.universal import UniversalAttack
from robustkit.result import Result
from robustkit.target import Target
from robustkit.testing._check_law import check_law
from robustkit.testing.hyperplane import Hyperplane
from robustkit.testing.nets import Counter, FailingNet, RandomClassifier, module_state, small_net, smooth_net
from robustkit.threats import L1, L2, Linf, Pixels, Threat

__all__ = ["AttackCase", "check_attack"]

TIE = 0.02  # if eps is within 2 % of the optimum, success is not checked: from a random start an attack is only nearly optimal


@final
@dataclass(frozen=True)
class AttackCase:
    """The arguments of one attack: points near a hyperplane, a threat, a seed, and which iterate to keep."""

    plane: Hyperplane
    threat: Threat
    seed: int
    keep: Keep

    def run(self, attack: Attack, target: Any, rows: Tensor | slice = slice(None), ids: Tensor | None = None) -> Result:
        """Run the attack on the points that `rows` selects."""
        x, y = self.plane.x[rows], self.plane.y[rows]
        return attack(target, x, y, threat=self.threat[rows], seed=self.seed, keep=self.keep, ids=ids)


def check_attack(
    attack: Attack,
    *,
    serves: Sequence[type[Threat]] = (Linf, L2, L1, Pixels),
    exact: Sequence[type[Threat]] = (),
    within: float | None = None,
    examples: int | None = None,
) -> int:
    """Check the laws on generated problems.

    Args:
        attack: The attack to check, with settings that make it fast.
        serves: The threats that it supports.
        exact: The threats (Linf or L2) in which it must solve a hyperplane whenever a solution exists.
        within: For minimum-norm attacks: the largest accepted ratio of the perturbation size to the optimum (not Pixels).
        examples: Number of cases per law; default that of the active hypothesis profile.

    Returns:
        The number of cases.

    Raises:
        AssertionError: A law is violated; hypothesis shows the smallest case.
        MissingExtraError: hypothesis is not installed.
    """
    count = sum(check_law(law, attack, _cases(serves), examples) for law in LAWS)
    for norm in exact:
        count += check_law(solves_a_hyperplane_whenever_possible, attack, _unbounded(norm), examples)
    if within is not None and any(norm is not Pixels for norm in serves):
        count += check_law(perturbation_is_near_the_optimum, (attack, within), _unbounded(*serves), examples)
    return count


def result_is_inside_the_threat(attack: Attack, case: AttackCase) -> None:
    """The result has the input's shape and dtype, is inside box and ball up to rounding, and `size` is its size."""
    result, x = case.run(attack, case.plane.net), case.plane.x
    assert result.x_adv.shape == x.shape
    assert result.x_adv.dtype == x.dtype
    assert not result.x_adv.requires_grad
    assert case.threat.contains(result.x_adv, x).all()
    assert torch.equal(result.size, case.threat.size(result.x_adv, x))


def success_matches_the_model(attack: Attack, case: AttackCase) -> None:
    """`success` is recomputed from the model's output on `x_adv`; `rate` is 0 or 1 for a deterministic model."""
    net = case.plane.net
    result = case.run(attack, net)
    assert torch.equal(result.success, net(result.x_adv).argmax(1) != case.plane.y)
    assert torch.equal(result.rate, result.success.float())


def costs_match_the_model_calls(attack: Attack, case: AttackCase) -> None:
    """`forwards` sums to the images that the model was called on, and backwards <= forwards, flat <= backwards."""
    counter = Counter(case.plane.net)
    result = case.run(attack, counter)
    assert int(result.forwards.sum()) == counter.seen
    assert (result.backwards <= result.forwards).all()
    assert (result.flat <= result.backwards).all()


def state_is_unchanged(attack: Attack, case: AttackCase) -> None:
    """Training flags, requires_grad, gradients, buffers, hooks, global random states and inputs are unchanged."""
    net = small_net(case.plane.x.shape[1:], case.seed)
    with _unchanged(net, case):
        case.run(attack, net)


def state_is_unchanged_when_the_model_raises(attack: Attack, case: AttackCase) -> None:
    """The same state is unchanged if the model raises, and its exception is not swallowed."""
    net = small_net(case.plane.x.shape[1:], case.seed)
    failing = FailingNet(net, calls=case.seed % 4)
    with _unchanged(failing, case):
        try:
            case.run(attack, failing)
        except FailingNet.FailureError:
            return
    assert failing.calls >= 0, "the model's exception was swallowed"


def same_seed_gives_identical_results(attack: Attack, case: AttackCase) -> None:
    """Two runs are equal bit for bit, whatever the state of the global generators."""
    net = small_net(case.plane.x.shape[1:], case.seed)
    first = case.run(attack, net)
    torch.rand(3)
    second = case.run(attack, net)
    for name in ("x_adv", "success", "rate", "size", "forwards", "backwards", "flat"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def result_does_not_depend_on_the_batch(attack: Attack, case: AttackCase) -> None:
    """An example with the same id gets the same result alone, in any order and in batches of any size.

    On a hyperplane bit for bit; on a smooth net in float64 up to rounding, which also detects gradients mixed between
    examples. A universal perturbation is learned first: from all examples, in either order.
    """
    n = len(case.plane.x)
    ids, reversed_rows = torch.arange(n) + 1000, torch.arange(n).flip(0)
    # Iterates on the surface of the ball have equal sizes up to rounding, so rounding would decide which is the smallest.
    keep: Keep = "last" if case.keep == "smallest" else case.keep
    smooth = replace(case, plane=replace(case.plane, x=case.plane.x.double()), keep=keep)
    nonlinear_net = smooth_net(case.plane.x.shape[1:], case.seed)
    for variant, net, tolerance in ((case, case.plane.net, 0.0), (smooth, nonlinear_net, 1e-9)):
        in_order, in_reverse = (_learn(attack, variant, net, rows, ids[rows]) for rows in (slice(None), reversed_rows))
        whole = variant.run(in_order, net, ids=ids)
        reverse = variant.run(in_reverse, Target(net, batch_size=max(1, n // 2)), reversed_rows, ids[reversed_rows])
        alone = variant.run(in_order, net, slice(n - 1, n), ids[-1:])
        assert torch.allclose(reverse.x_adv.flip(0), whole.x_adv, rtol=0, atol=tolerance)
        assert torch.allclose(alone.x_adv, whole.x_adv[-1:], rtol=0, atol=tolerance)


def _learn(attack: Attack, case: AttackCase, net: torch.nn.Module, rows: Tensor | slice, ids: Tensor) -> Attack:
    """Return the perturbation that a universal attack learns from the points; other attacks as they are."""
    if not isinstance(attack, UniversalAttack):
        return attack
    return attack.learn(net, case.plane.x[rows], case.plane.y[rows], threat=case.threat[rows], seed=case.seed, ids=ids)


def never_beats_the_optimum(attack: Attack, case: AttackCase) -> None:
    """No success where the closed form shows that none exists in the threat, box included."""
    plane = case.plane
    result = case.run(attack, plane.net)
    reachable = plane.best_gain(case.threat) >= plane.margin - 1e-6 * (1 + plane.margin)
    assert (~result.success | reachable).all()


def no_success_against_random_predictions(attack: Attack, case: AttackCase) -> None:
    """No success is reported against a model whose predictions are random and wrong with probability 1/4."""
    x, y = case.plane.x, torch.zeros_like(case.plane.y)
    result = attack(RandomClassifier(wrong=0.25), x, y, threat=case.threat, seed=case.seed, keep=case.keep)
    assert not result.success.any()
    assert (result.rate < 0.6).all()


LAWS = (
    result_is_inside_the_threat,
    success_matches_the_model,
    costs_match_the_model_calls,
    state_is_unchanged,
    state_is_unchanged_when_the_model_raises,
    same_seed_gives_identical_results,
    result_does_not_depend_on_the_batch,
    never_beats_the_optimum,
    no_success_against_random_predictions,
)


def solves_a_hyperplane_whenever_possible(attack: Attack, case: AttackCase) -> None:
    """Without bounds, it succeeds exactly where eps exceeds |margin| / dual norm, near ties excluded."""
    plane, eps = case.plane, float(case.threat.eps)
    optimum = plane.optimal_size(type(case.threat))
    result = attack(plane.net, plane.x, plane.y, threat=case.threat, seed=case.seed)
    no_tie = (eps / optimum - 1).abs() > TIE
    assert torch.equal(result.success[no_tie], (eps > optimum)[no_tie])


def perturbation_is_near_the_optimum(attack_and_ratio: tuple[Attack, float], case: AttackCase) -> None:
    """Without bounds, the perturbation size is at most `within` times the distance to the hyperplane."""
    attack, within = attack_and_ratio
    plane, eps = case.plane, float(case.threat.eps)
    optimum = plane.optimal_size(type(case.threat))
    result = attack(plane.net, plane.x, plane.y, threat=case.threat, seed=case.seed, keep="smallest")
    easy = eps > within * optimum
    assert result.success[easy].all()
    assert (result.size[easy] <= within * optimum[easy] + 1e-9).all()


@contextmanager
def _unchanged(net: torch.nn.Module, case: AttackCase) -> Iterator[None]:
    """Assert that the block leaves the net, the global random states and the inputs unchanged."""
    x, y = case.plane.x.clone(), case.plane.y.clone()
    before = module_state(net), random_state()
    yield
    assert before == (module_state(net), random_state())
    assert torch.equal(x, case.plane.x)
    assert torch.equal(y, case.plane.y)


def _cases(serves: Sequence[type[Threat]]) -> Any:  # Any: hypothesis is an extra
    from hypothesis import strategies as st

    from robustkit.testing.strategies import hyperplanes, threats

    keeps = st.sampled_from(["first", "best", "smallest", "last"])
    planes = hyperplanes(largest=3).map(lambda plane: plane.single())
    bounds = st.sampled_from([(0.0, 1.0), (-0.5, 1.25)])

    def case_of(
        plane: Hyperplane, threat: Threat, bounds: tuple[float, float], per_example: bool, seed: int, keep: Keep
    ) -> AttackCase:
        """One eps for all examples, or one per example."""
        n, eps = len(plane.x), float(threat.eps)
        shares = torch.ones(n) if isinstance(threat, Pixels) else torch.linspace(0.25, 1.0, n)
        return AttackCase(plane, replace(threat, eps=eps * shares if per_example else threat.eps, bounds=bounds), seed, keep)

    return st.builds(case_of, planes, threats(serves), bounds, st.booleans(), st.integers(0, 2**31), keeps)


def _unbounded(*norms: type[Threat]) -> Any:  # Any: hypothesis is an extra
    """Cases without bounds whose eps is 0.3 to 4 times the median distance of the points to the plane."""
    from hypothesis import strategies as st

    from robustkit.testing.strategies import hyperplanes

    def of_plane(plane: Hyperplane, norm: type[Threat], share: float, seed: int) -> AttackCase:
        eps = max(float(plane.optimal_size(norm).median()) * share, 1e-6)
        return AttackCase(plane, norm(eps, bounds=None), seed, "first")

    lp = [norm for norm in norms if norm is not Pixels]
    return st.builds(of_plane, hyperplanes(largest=3), st.sampled_from(lp), st.floats(0.3, 4.0), st.integers(0, 2**31))
