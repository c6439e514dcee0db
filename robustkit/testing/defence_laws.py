"""The laws of a defence, which its evaluation relies on."""

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
from robustkit.testing._check_law import check_law
from robustkit.testing.nets import module_state

__all__ = ["DefenceCase", "check_defence"]


@final
@dataclass(frozen=True)
class DefenceCase:
    """Inputs in [0, 1], (N, *S), and a seed."""

    x: Tensor
    seed: int

    def noise(self, rows: slice = slice(None)) -> Noise:
        """Return the noise source of the selected examples."""
        return Noise(self.seed, torch.arange(len(self.x))[rows])

    def value(self, fn: Fn) -> Tensor:
        """Return the output of a function on the inputs, with the same random state in each call."""
        with fork_rng(self.seed), torch.no_grad():
            out: Tensor = fn(self.x.clone())
            return out


def check_defence(defence: Defence, *, shape: Sequence[int] = (1, 8, 8), examples: int | None = None) -> int:
    """Check the laws on generated inputs in [0, 1], in evaluation mode; the defence is restored afterwards.

    Whether an exact view is detached somewhere inside is not checked, because a zero gradient may be correct. The first view
    must have a nonzero gradient.

    Args:
        defence: The defence.
        shape: The shape of one input.
        examples: Number of cases per law; default that of the active hypothesis profile.

    Returns:
        The number of cases.

    Raises:
        AssertionError: A law is violated; hypothesis shows the smallest case.
        ArgumentError: `defence` is not a `Defence`, or has no views.
        MissingExtraError: hypothesis is not installed.
    """
    if not isinstance(defence, Defence):
        raise ArgumentError(f"defence={defence!r} must be a Defence, such as robustkit.defences.Quantise(8)")
    defence.checked_views()
    with frozen(defence, "eval"), fork_rng(0):
        return sum(check_law(law, defence, _cases(tuple(shape)), examples) for law in LAWS)


def rows_are_independent(defence: Defence, case: DefenceCase) -> None:
    """The output has the shape and dtype of the input, is finite, and row i depends only on row i."""
    whole = case.value(partial(defence, noise=case.noise()))
    assert whole.shape == case.x.shape
    assert whole.dtype == case.x.dtype
    assert whole.isfinite().all()
    last = slice(len(case.x) - 1, len(case.x))
    alone = defence(case.x[last], noise=case.noise(last)).detach()
    assert torch.allclose(alone, whole[last], rtol=0, atol=1e-5)


def only_stochastic_defences_are_random(defence: Defence, case: DefenceCase) -> None:
    """Two calls on the same input differ only if `stochastic` is True, and never if the noise is given."""
    before = random_state()
    first, second = (defence(case.x, noise=case.noise()) for _ in range(2))
    assert torch.equal(first, second), "the output differs for the same noise"
    assert random_state() == before, "it draws from a global generator although noise is given"
    if not defence.stochastic:
        assert torch.equal(defence(case.x), first), "stochastic is False, but the output varies or depends on the noise"
        assert random_state() == before, "stochastic is False, but it draws from a global generator"


def exact_views_have_the_exact_value(defence: Defence, case: DefenceCase) -> None:
    """A view named "exact" or "bpda" has the value of the defence bit for bit, with and without gradients."""
    value = case.value(defence)
    for name, view in defence.views().items():
        if name in ("exact", "bpda"):
            assert torch.equal(case.value(view), value), name
            with fork_rng(case.seed):
                assert torch.equal(view(case.x.clone().requires_grad_()).detach(), value), name


def views_have_finite_nonzero_gradients(defence: Defence, case: DefenceCase) -> None:
    """Each view has the output shape of the defence and finite gradients; those of the first view are not zero."""
    value = case.value(defence)
    for index, view in enumerate(defence.views().values()):
        x = case.x.clone().requires_grad_()
        with fork_rng(case.seed):
            out = view(x)
        assert out.shape == value.shape
        grad = torch.autograd.grad((out * case.noise().at("slope").uniform(*out.shape[1:])).sum(), x, allow_unused=True)[0]
        assert grad is None or grad.isfinite().all()
        assert index or (grad is not None and bool((abs_max(grad) > 0).all())), "the gradient of the first view is zero"


def score_is_one_number_per_input(defence: Defence, case: DefenceCase) -> None:
    """`score` is None, or one finite number per input."""
    score = defence.score(case.x)
    assert score is None or (score.shape == case.x.shape[:1] and bool(score.isfinite().all()))


def guarded_target_uses_the_defence_and_its_views(defence: Defence, case: DefenceCase) -> None:
    """The guarded target applies the target to the output of the defence, and has the views of the defence."""
    module = nn.Flatten()
    target = defence.guard(module)
    assert torch.equal(case.value(target.fn), module(case.value(defence)))
    assert list(target.views) == list(defence.views())


def state_is_unchanged(defence: Defence, case: DefenceCase) -> None:
    """Neither a call nor a backward pass changes the input or the defence."""
    x, before = case.x.clone(), module_state(defence)
    fns: tuple[Fn, ...] = (defence, *defence.views().values())
    for fn in fns:
        argument = x.clone()
        fn(argument)
        out = fn(argument.clone().requires_grad_())
        assert torch.equal(argument, case.x)
        if out.requires_grad:
            out.sum().backward()
    assert before == module_state(defence)


LAWS = (
    rows_are_independent,
    only_stochastic_defences_are_random,
    exact_views_have_the_exact_value,
    views_have_finite_nonzero_gradients,
    score_is_one_number_per_input,
    guarded_target_uses_the_defence_and_its_views,
    state_is_unchanged,
)


def _cases(shape: tuple[int, ...]) -> Any:  # Any: hypothesis is an extra
    from hypothesis import strategies as st

    def case_of(n: int, seed: int) -> DefenceCase:
        return DefenceCase(Noise(seed, torch.arange(n)).at("x").uniform(*shape), seed)

    return st.builds(case_of, st.integers(1, 4), st.integers(0, 2**31))
