"""The laws of an attack: what every attack must obey, whatever it does inside."""

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
from robustkit.testing._runs import holds
from robustkit.testing.hyperplane import Hyperplane
from robustkit.testing.nets import Coin, Counter, Fuse, small_net, smooth_net, world_of
from robustkit.threats import L1, L2, Linf, Pixels, Threat

__all__ = ["AttackCase", "check_attack"]

TIE = 0.02  # budgets within 2 % of the optimum may fall either way: a random start turns towards it, never quite


@final
@dataclass(frozen=True)
class AttackCase:
    """One call: points beside a hyperplane, a threat, a seed, and which iterate to keep."""

    plane: Hyperplane
    threat: Threat
    seed: int
    keep: Keep

    def run(self, attack: Attack, target: Any, rows: Tensor | slice = slice(None), ids: Tensor | None = None) -> Result:
        """The attack on some of the points."""
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
        attack: The attack to check, with settings that make it quick.
        serves: The threats that it works with.
        exact: Those (of Linf and L2) in which it must solve a hyperplane whenever that can be done.
        within: For minimum-norm attacks: the largest accepted ratio of the smallest success to the optimum (not Pixels).
        examples: Cases for each law; default that of the active hypothesis profile.

    Returns:
        How many cases were run.

    Raises:
        AssertionError: A law does not hold; hypothesis shows the smallest case.
    """
    count = sum(holds(law, attack, _cases(serves), examples) for law in LAWS)
    for norm in exact:
        count += holds(solves_a_hyperplane_exactly, attack, _unbounded(norm), examples)
    if within is not None and any(norm is not Pixels for norm in serves):
        count += holds(comes_close_to_the_optimum, (attack, within), _unbounded(*serves), examples)
    return count


def stays_in_the_threat(attack: Attack, case: AttackCase) -> None:
    """Shape, type and device of the input, box and ball by the size law, and `size` says so."""
    result, x = case.run(attack, case.plane.net), case.plane.x
    assert result.x_adv.shape == x.shape
    assert result.x_adv.dtype == x.dtype
    assert not result.x_adv.requires_grad
    assert case.threat.contains(result.x_adv, x).all()
    assert torch.equal(result.size, case.threat.size(result.x_adv, x))


def success_is_a_recount(attack: Attack, case: AttackCase) -> None:
    """`success` is what the model says of `x_adv` when anybody asks; `rate` is 0 or 1 without randomness."""
    net = case.plane.net
    result = case.run(attack, net)
    assert torch.equal(result.success, net(result.x_adv).argmax(1) != case.plane.y)
    assert torch.equal(result.rate, result.success.float())


def costs_are_what_the_model_saw(attack: Attack, case: AttackCase) -> None:
    """`forwards` sums to the images that went through the model, and no gradient is taken without a forward."""
    counter = Counter(case.plane.net)
    result = case.run(attack, counter)
    assert int(result.forwards.sum()) == counter.seen
    assert (result.backwards <= result.forwards).all()
    assert (result.flat <= result.backwards).all()


def leaves_the_world_alone(attack: Attack, case: AttackCase) -> None:
    """Flags, switches, gradients, buffers, hooks, global random states and inputs are as before."""
    net = small_net(case.plane.x.shape[1:], case.seed)
    with _unchanged(net, case):
        case.run(attack, net)


def leaves_the_world_alone_when_the_model_raises(attack: Attack, case: AttackCase) -> None:
    """The same when the model fails midway, and its own exception comes through."""
    net = small_net(case.plane.x.shape[1:], case.seed)
    fuse = Fuse(net, calls=case.seed % 4)
    with _unchanged(fuse, case):
        try:
            case.run(attack, fuse)
        except Fuse.BlownError:
            return
    assert fuse.calls >= 0, "the model's exception was swallowed"


def same_seed_same_bytes(attack: Attack, case: AttackCase) -> None:
    """Two runs are equal bit for bit, whatever the global generators hold."""
    net = small_net(case.plane.x.shape[1:], case.seed)
    one = case.run(attack, net)
    torch.rand(3)
    other = case.run(attack, net)
    for name in ("x_adv", "success", "rate", "size", "forwards", "backwards", "flat"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def noise_belongs_to_the_example(attack: Attack, case: AttackCase) -> None:
    """An example named by its id gets the same answer alone, in any order, and in batches of any size.

    On a hyperplane bit for bit; on a smooth net in float64 but for rounding, so that gradients that are mixed between
    examples show too. Of a universal attack the change is learned first: it comes from all examples, in whatever order.
    """
    n = len(case.plane.x)
    ids, backwards = torch.arange(n) + 1000, torch.arange(n).flip(0)
    smooth = replace(case, plane=replace(case.plane, x=case.plane.x.double()))
    curved = smooth_net(case.plane.x.shape[1:], case.seed)
    for view, net, tolerance in ((case, case.plane.net, 0.0), (smooth, curved, 1e-9)):
        used, other = (_learned(attack, view, net, rows, ids[rows]) for rows in (slice(None), backwards))
        whole = view.run(used, net, ids=ids)
        turned = view.run(other, Target(net, batch_size=max(1, n // 2)), backwards, ids[backwards])
        assert torch.allclose(turned.x_adv.flip(0), whole.x_adv, rtol=0, atol=tolerance)
        alone = view.run(used, net, slice(n - 1, n), ids[-1:])
        assert torch.allclose(alone.x_adv, whole.x_adv[-1:], rtol=0, atol=tolerance)


def _learned(attack: Attack, case: AttackCase, net: torch.nn.Module, rows: Tensor | slice, ids: Tensor) -> Attack:
    if not isinstance(attack, UniversalAttack):
        return attack
    return attack.learn(net, case.plane.x[rows], case.plane.y[rows], threat=case.threat[rows], seed=case.seed, ids=ids)


def never_beats_the_optimum(attack: Attack, case: AttackCase) -> None:
    """No success where the closed form says that there is none in the threat, its box included."""
    plane = case.plane
    result = case.run(attack, plane.net)
    reachable = plane.best_gain(case.threat) >= plane.margin - 1e-6 * (1 + plane.margin)
    assert (~result.success | reachable).all()


def claims_nothing_against_a_coin(attack: Attack, case: AttackCase) -> None:
    """A model that is wrong on a quarter of all calls, whatever the input, is never claimed to be broken."""
    x, right = case.plane.x, torch.zeros_like(case.plane.y)
    result = attack(Coin(wrong=0.25), x, right, threat=case.threat, seed=case.seed, keep=case.keep)
    assert not result.success.any()
    assert (result.rate < 0.6).all()


LAWS = (
    stays_in_the_threat,
    success_is_a_recount,
    costs_are_what_the_model_saw,
    leaves_the_world_alone,
    leaves_the_world_alone_when_the_model_raises,
    same_seed_same_bytes,
    noise_belongs_to_the_example,
    never_beats_the_optimum,
    claims_nothing_against_a_coin,
)


def solves_a_hyperplane_exactly(attack: Attack, case: AttackCase) -> None:
    """Without bounds, it succeeds exactly where eps exceeds |margin| / dual norm, ties excluded."""
    plane, eps = case.plane, float(case.threat.eps)
    optimum = plane.optimal_size(type(case.threat))
    result = attack(plane.net, plane.x, plane.y, threat=case.threat, seed=case.seed)
    clear = (eps / optimum - 1).abs() > TIE
    assert torch.equal(result.success[clear], (eps > optimum)[clear])


def comes_close_to_the_optimum(claim: tuple[Attack, float], case: AttackCase) -> None:
    """Without bounds, the smallest success is at most `within` times the distance to the hyperplane."""
    attack, within = claim
    plane, eps = case.plane, float(case.threat.eps)
    optimum = plane.optimal_size(type(case.threat))
    result = attack(plane.net, plane.x, plane.y, threat=case.threat, seed=case.seed, keep="smallest")
    easy = eps > within * optimum
    assert result.success[easy].all()
    assert (result.size[easy] <= within * optimum[easy] + 1e-9).all()


@contextmanager
def _unchanged(net: torch.nn.Module, case: AttackCase) -> Iterator[None]:
    x, y = case.plane.x.clone(), case.plane.y.clone()
    before = world_of(net), random_state()
    yield
    assert before == (world_of(net), random_state())
    assert torch.equal(x, case.plane.x)
    assert torch.equal(y, case.plane.y)


def _cases(serves: Sequence[type[Threat]]) -> Any:  # Any: hypothesis is an extra
    from hypothesis import strategies as st

    from robustkit.testing.strategies import hyperplanes, threats

    keeps = st.sampled_from(["first", "best", "smallest", "last"])
    planes = hyperplanes(largest=3).map(lambda plane: plane.single())
    bounds = st.sampled_from([(0.0, 1.0), (-0.5, 1.25)])

    def case_of(
        plane: Hyperplane, threat: Threat, bounds: tuple[float, float], each: bool, seed: int, keep: Keep
    ) -> AttackCase:
        """Budgets of one number for all, or of one an example."""
        n, one = len(plane.x), float(threat.eps)
        shares = torch.ones(n) if isinstance(threat, Pixels) else torch.linspace(0.25, 1.0, n)
        return AttackCase(plane, replace(threat, eps=one * shares if each else threat.eps, bounds=bounds), seed, keep)

    return st.builds(case_of, planes, threats(serves), bounds, st.booleans(), st.integers(0, 2**31), keeps)


def _unbounded(*norms: type[Threat]) -> Any:  # Any: hypothesis is an extra
    """Cases without bounds whose budget is a share of the distance of one of the points to the plane."""
    from hypothesis import strategies as st

    from robustkit.testing.strategies import hyperplanes

    def of_plane(plane: Hyperplane, norm: type[Threat], share: float, seed: int) -> AttackCase:
        eps = max(float(plane.optimal_size(norm).median()) * share, 1e-6)
        return AttackCase(plane, norm(eps, bounds=None), seed, "first")

    lp = [norm for norm in norms if norm is not Pixels]
    return st.builds(of_plane, hyperplanes(largest=3), st.sampled_from(lp), st.floats(0.3, 4.0), st.integers(0, 2**31))
