"""The laws of a defence: what an evaluation of it takes for granted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from robustkit._engine.noise import Noise
from robustkit._engine.state_guard import fork_rng, frozen, random_state
from robustkit._engine.tensors import abs_max
from robustkit.defence import Defence
from robustkit.errors import ArgumentError
from robustkit.target import Fn
from robustkit.testing._runs import holds
from robustkit.testing.nets import world_of

__all__ = ["DefenceCase", "check_defence"]


@final
@dataclass(frozen=True)
class DefenceCase:
    """Some inputs in [0, 1], (N, *S), and a seed."""

    x: Tensor
    seed: int

    def noise(self, rows: slice = slice(None)) -> Noise:
        """The random numbers of some of the examples."""
        return Noise(self.seed, torch.arange(len(self.x))[rows])

    def value(self, fn: Fn) -> Tensor:
        """What a function says of the inputs, from the same random state each time."""
        with fork_rng(self.seed), torch.no_grad():
            out: Tensor = fn(self.x.clone())
            return out


def check_defence(defence: Defence, *, shape: Sequence[int] = (1, 8, 8), examples: int | None = None) -> int:
    """Check the laws on generated inputs in [0, 1], in evaluation mode; afterwards the defence is as before.

    That an exact view is not detached somewhere inside cannot be told from a slope that is zero by nature; that the first
    view has a slope can, and is.

    Args:
        defence: The defence.
        shape: The shape of one input.
        examples: Cases for each law; default that of the active hypothesis profile.

    Returns:
        How many cases were run.

    Raises:
        AssertionError: A law does not hold; hypothesis shows the smallest case.
        ArgumentError: `defence` is none, or names no views.
        MissingExtraError: hypothesis is not installed.
    """
    if not isinstance(defence, Defence):
        raise ArgumentError(f"defence={defence!r} must be a Defence, such as robustkit.defences.Quantise(8)")
    defence.checked_views()
    with frozen(defence, "eval"), fork_rng(0):
        return sum(holds(law, defence, _cases(tuple(shape)), examples) for law in LAWS)


def takes_rows_by_themselves(defence: Defence, case: DefenceCase) -> None:
    """Inputs come out in their shape and type, finite, and what one becomes does not depend on the others."""
    whole = case.value(partial(defence, noise=case.noise()))
    assert whole.shape == case.x.shape
    assert whole.dtype == case.x.dtype
    assert whole.isfinite().all()
    last = slice(len(case.x) - 1, len(case.x))
    alone = defence(case.x[last], noise=case.noise(last)).detach()
    assert torch.allclose(alone, whole[last], rtol=0, atol=1e-5)


def is_honest_about_randomness(defence: Defence, case: DefenceCase) -> None:
    """Two calls on the same input differ only if it says `stochastic`, and never where the noise is given."""
    before = random_state()
    one, other = (defence(case.x, noise=case.noise()) for _ in range(2))
    assert torch.equal(one, other), "given the same noise, it still differs"
    assert random_state() == before, "given noise, it draws from a global generator"
    if not defence.stochastic:
        assert torch.equal(defence(case.x), one), "it is not stochastic, yet changes or looks at the noise"
        assert random_state() == before, "it is not stochastic, yet draws from a global generator"


def exact_means_exact(defence: Defence, case: DefenceCase) -> None:
    """A view that calls itself "exact" or "bpda" has the value of the defence bit for bit, with gradients and without."""
    value = case.value(defence)
    for name, view in defence.views().items():
        if name in ("exact", "bpda"):
            assert torch.equal(case.value(view), value), name
            with fork_rng(case.seed):
                assert torch.equal(view(case.x.clone().requires_grad_()).detach(), value), name


def views_show_a_way(defence: Defence, case: DefenceCase) -> None:
    """Each view keeps the shape of the defence and has finite derivatives; those of the first are not all zero."""
    value = case.value(defence)
    for number, view in enumerate(defence.views().values()):
        x = case.x.clone().requires_grad_()
        with fork_rng(case.seed):
            out = view(x)
        assert out.shape == value.shape
        grad = torch.autograd.grad((out * case.noise().at("slope").uniform(*out.shape[1:])).sum(), x, allow_unused=True)[0]
        assert grad is None or grad.isfinite().all()
        assert number or (grad is not None and bool((abs_max(grad) > 0).all())), "the first view leads nowhere"


def scores_a_number_each(defence: Defence, case: DefenceCase) -> None:
    """`score` is None, or one finite number an input."""
    score = defence.score(case.x)
    assert score is None or (score.shape == case.x.shape[:1] and bool(score.isfinite().all()))


def guards_what_is_behind_it(defence: Defence, case: DefenceCase) -> None:
    """A guarded target is the target of the defended input, and its views are those of the defence."""
    behind = nn.Flatten()
    target = defence.guard(behind)
    assert torch.equal(case.value(target.fn), behind(case.value(defence)))
    assert list(target.views) == list(defence.views())


def leaves_the_world_alone(defence: Defence, case: DefenceCase) -> None:
    """Neither the input nor the defence itself is changed by a call or by a derivative."""
    x, before = case.x.clone(), world_of(defence)
    fns: tuple[Fn, ...] = (defence, *defence.views().values())
    for fn in fns:
        asked = x.clone()
        fn(asked)
        out = fn(asked.clone().requires_grad_())
        assert torch.equal(asked, case.x)
        if out.requires_grad:
            out.sum().backward()
    assert before == world_of(defence)


LAWS = (
    takes_rows_by_themselves,
    is_honest_about_randomness,
    exact_means_exact,
    views_show_a_way,
    scores_a_number_each,
    guards_what_is_behind_it,
    leaves_the_world_alone,
)


def _cases(shape: tuple[int, ...]) -> Any:  # Any: hypothesis is an extra
    from hypothesis import strategies as st

    def case_of(n: int, seed: int) -> DefenceCase:
        return DefenceCase(Noise(seed, torch.arange(n)).at("x").uniform(*shape), seed)

    return st.builds(case_of, st.integers(1, 4), st.integers(0, 2**31))
