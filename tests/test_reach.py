"""The same attacks on models that are no classifiers: a small embedding, a small autoencoder and a density.

Their goals are written here as a user would write them, which shows that the core needs nothing more.
"""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from cases import ATTACKS
from hypothesis import strategies as st
from torch import nn

from robustkit import FGSM, L2, PGD, Goal, Linf
from robustkit.testing import check_goal


@dataclass(frozen=True)
class Away(Goal):
    """The output is further than `radius` from the reference."""

    radius: float
    vanishes_at_x: ClassVar[bool] = True

    def loss(self, out, ref):
        return -(out - ref).flatten(1).square().sum(1)

    def success(self, out, ref):
        return -self.loss(out, ref) > self.radius**2


@dataclass(frozen=True)
class Unlikely(Goal):
    """The log-density, the second of two outputs, is below `level`."""

    level: float

    def loss(self, out, ref):
        return out[1]

    def success(self, out, ref):
        return out[1] < self.level


torch.manual_seed(0)
X = torch.rand(8, 1, 4, 4) * 0.6 + 0.2
LINEAR = nn.Linear(16, 3, bias=False)


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(16, 2), nn.Linear(2, 16)

    def reconstruct(self, x):
        return self.decoder(self.encoder(x.flatten(1))).reshape(x.shape)


def embed(x):
    return LINEAR(x.flatten(1))


def density(x):
    """A score, and the log-density of a standard normal around one half, up to a constant."""
    return x.mean((1, 2, 3)), -0.5 * (x - 0.5).flatten(1).square().sum(1)


def test_the_goals_pass_their_laws(cases):
    pairs = st.tuples(st.integers(1, 4), st.integers(0, 99)).map(lambda s: torch.randn(2, s[0], 3).unbind(0))
    cases(check_goal(Away(0.5), pairs.map(tuple)))
    cases(check_goal(Unlikely(-1.0), pairs.map(lambda p: ((p[0], p[0].sum(1)), p[1]))))


def test_an_embedding_moves_as_far_as_its_largest_singular_value_allows():
    """|W delta| under |delta|_2 <= eps is largest along the first singular vector: eps * sigma_1."""
    best = 0.3 * torch.linalg.svdvals(LINEAR.weight)[0].item()
    threat = L2(0.3, bounds=None)
    for radius, possible in ((0.9 * best, True), (1.01 * best, False)):
        result = PGD(steps=100, reach=20)(embed, X, embed(X).detach(), goal=Away(radius), threat=threat, keep="best")
        assert result.success.all() if possible else not result.success.any()
        assert result.flat.sum() == 0


def test_a_gradient_that_vanishes_at_x_by_definition_is_not_counted_as_flat():
    """FGSM starts at x, where the gradient of the distance to x is zero: it cannot move, which is no gradient masking."""
    result = FGSM()(embed, X, embed(X).detach(), goal=Away(0.1), threat=Linf(0.1))
    assert not result.success.any()
    assert (result.size == 0).all()
    assert result.flat.sum() == 0


def test_an_autoencoder_is_attacked_through_its_bound_method():
    torch.manual_seed(1)
    autoencoder = Autoencoder().train()
    ref = autoencoder.reconstruct(X).detach()
    result = PGD(steps=20)(autoencoder.reconstruct, X, ref, goal=Away(0.05), threat=Linf(0.1))
    assert torch.equal(result.success, (autoencoder.reconstruct(result.x_adv) - ref).flatten(1).norm(dim=1) > 0.05)
    assert result.success.any()
    assert autoencoder.training
    assert [flag.name for flag in result.flags] == ["train-mode"]


def test_a_density_falls_to_its_closed_form_minimum():
    """The lowest log-density in an L2 ball lies on the line from the centre through x: -(|x - 1/2| + eps)^2 / 2."""
    eps = 0.4
    distance = (X - 0.5).flatten(1).norm(dim=1)
    lowest = -0.5 * (distance + eps) ** 2
    result = PGD(steps=60, reach=10, random_start=False)(
        density, X, X, goal=Unlikely(-99.0), threat=L2(eps, bounds=None), keep="best"
    )
    torch.testing.assert_close(density(result.x_adv)[1], lowest, rtol=1e-4, atol=0)


@pytest.mark.parametrize("row", ATTACKS, ids=lambda row: row.name)
def test_every_attack_runs_on_outputs_other_than_logits(row):
    for threat in (kind(1) for kind in row.serves):
        result = row.attack(density, X, X, goal=Unlikely(-0.5), threat=threat)
        assert torch.equal(result.success, density(result.x_adv)[1] < -0.5)
