"""The noise is normal with standard deviation sigma, and keyed by example if a source is given."""

import math

import pytest
import torch
from scipy import stats

from robustkit import PGD, Linf
from robustkit._engine.noise import Noise
from robustkit.defences import GaussianNoise
from robustkit.errors import ArgumentError
from robustkit.testing import check_defence


@pytest.mark.parametrize("given", [False, True])
def test_the_noise_is_normal_with_standard_deviation_sigma(given):
    torch.manual_seed(0)
    x = torch.rand(50, 3, 10, 10)
    added = (GaussianNoise(0.2)(x, noise=Noise(0, torch.arange(50)) if given else None) - x).flatten(1) / 0.2
    assert stats.kstest(added.flatten().numpy(), "norm").pvalue > 0.01
    assert abs(float(added.mean())) < 4 / math.sqrt(15_000)
    assert abs(float(added.var()) - 1) < 4 * math.sqrt(2 / 15_000)
    correlations = torch.corrcoef(added)[~torch.eye(50, dtype=torch.bool)]
    assert float(correlations.abs().max()) < 5 / math.sqrt(300)  # rows are independent


def test_the_output_is_not_clipped():
    out = GaussianNoise(1.0)(torch.zeros(1, 1000))
    assert out.min() < -2
    assert out.max() > 2


def test_noise_from_a_source_depends_on_the_example_only():
    x, noise = torch.rand(6, 1, 4, 4), Noise(3, torch.tensor([4, 8, 15, 16, 23, 42]))
    whole = GaussianNoise(0.1)(x, noise=noise)
    order = torch.tensor([5, 0, 3])
    assert torch.equal(GaussianNoise(0.1)(x[order], noise=noise[order]), whole[order])
    assert torch.allclose(whole - x, 2 * (GaussianNoise(0.05)(x, noise=noise) - x), atol=1e-6)
    assert not torch.equal(GaussianNoise(0.1)(x, noise=noise.at("other")), whole)


def test_without_a_source_the_global_generator_is_used():
    x, defence = torch.rand(2, 3), GaussianNoise(0.1)
    torch.manual_seed(0)
    one, other = defence(x), defence(x)
    torch.manual_seed(0)
    assert torch.equal(x + 0.1 * torch.randn(2, 3), one)
    assert not torch.equal(one, other)


def test_the_derivative_is_that_of_the_identity():
    x = torch.rand(2, 3, requires_grad=True)
    assert list(GaussianNoise().views()) == ["exact"]
    assert torch.equal(torch.autograd.grad(GaussianNoise().views()["exact"](x).sum(), x)[0], torch.ones(2, 3))


def test_a_success_holds_on_most_draws():
    """Logits (0, x - b): with the noise, b - m is misclassified with probability P(sigma n > m), in closed form."""

    def net(z):
        return torch.cat([torch.zeros(len(z), 1), z - 0.5], 1)

    x, y = torch.linspace(0.1, 0.45, 8)[:, None], torch.zeros(8, dtype=torch.int64)
    result = PGD(steps=20)(GaussianNoise(0.05).guard(net, draws=5), x, y, threat=Linf(0.2))
    assert torch.equal(result.success[[0, 1, 2, 5, 6, 7]], torch.tensor([False, False, False, True, True, True]))
    margin = result.x_adv[:, 0].double() - 0.5
    expected = torch.tensor(stats.norm.cdf(margin.numpy() / 0.05))
    assert ((result.rate - expected).abs() < 4 * (expected * (1 - expected) / 40).sqrt() + 0.02).all()


def test_it_obeys_the_laws(cases):
    cases(check_defence(GaussianNoise(0.3), examples=8))
    cases(check_defence(GaussianNoise(1), shape=(5,), examples=8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_dtype_is_preserved(dtype):
    x = torch.rand(2, 5).to(dtype)
    assert GaussianNoise()(x).dtype == dtype
    assert GaussianNoise()(x, noise=Noise(0, torch.arange(2))).dtype == dtype


@pytest.mark.parametrize("sigma", [0, -0.1, math.inf, math.nan, "1", True, None])
def test_an_invalid_sigma_is_refused(sigma):
    with pytest.raises(ArgumentError, match="sigma"):
        GaussianNoise(sigma)


def test_repr():
    assert repr(GaussianNoise(0.25)) == "GaussianNoise(sigma=0.25)"
