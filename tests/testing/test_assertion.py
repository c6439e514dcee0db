import pytest
import torch
from torch import nn

from robustkit import FGSM, Linf
from robustkit.attacks import Perturbation
from robustkit.errors import ArgumentError
from robustkit.testing import Hyperplane, assert_robust
from robustkit.testing.hyperplane import Halfspace


def points(*distances):
    """Return points at the given Linf distances from a plane, all of the second class."""
    weight = torch.tensor([1.0, -1.0]).reshape(1, 1, 2)
    x = torch.stack([torch.tensor([0.5 + d, 0.5 - d]).reshape(1, 1, 2) for d in distances])
    return Hyperplane(Halfspace(weight, 0.0), x, torch.ones(len(distances), dtype=torch.int64))


def test_robust_accuracy_is_exact():
    plane = points(0.05, 0.15, 0.25, 0.35)
    result = assert_robust(plane.net, plane.x, plane.y, threat=Linf(0.2), at_least=0.5)
    assert result.success.tolist() == [True, True, False, False]
    with pytest.raises(AssertionError, match=r"50.0% \(2 of 4\), below 51.0%, under Linf.* by FGSM\(\); .*: \[0, 1\]"):
        assert_robust(plane.net, plane.x, plane.y, threat=Linf(0.2), at_least=0.51, attack=FGSM())


def test_invalid_arguments_are_refused():
    plane = points(0.1)
    with pytest.raises(ArgumentError, match="at_least=50"):
        assert_robust(plane.net, plane.x, plane.y, threat=Linf(0.2), at_least=50)
    with pytest.raises(ArgumentError, match="no examples"):
        assert_robust(plane.net, plane.x[:0], plane.y[:0], threat=Linf(0.2), at_least=0.5)


def test_the_closed_forms_of_the_hyperplane():
    from robustkit import L1, L2, Pixels

    plane = points(0.1, 0.2)
    torch.testing.assert_close(plane.margin, torch.tensor([0.2, 0.4], dtype=torch.float64))
    torch.testing.assert_close(plane.optimal_size(Linf), torch.tensor([0.1, 0.2], dtype=torch.float64))
    torch.testing.assert_close(plane.optimal_size(L2), torch.tensor([0.2, 0.4], dtype=torch.float64) / 2**0.5)
    torch.testing.assert_close(plane.optimal_size(L1), torch.tensor([0.2, 0.4], dtype=torch.float64))
    torch.testing.assert_close(plane.best_gain(Pixels(1)), torch.tensor([0.6, 0.7], dtype=torch.float64))
    torch.testing.assert_close(plane.best_gain(Linf(0.65)), torch.tensor([1.2, 1.3], dtype=torch.float64))
    assert isinstance(plane.net, nn.Module)


def test_a_universal_perturbation_that_corrects_wrong_images_does_not_count_as_robustness():
    """Half of the clean images are misclassified; the perturbation corrects these and does not affect the others."""
    model = lambda x: torch.stack([x.flatten(1).sum(1), torch.ones(len(x))], 1)  # noqa: E731
    x, y = torch.cat([torch.full((5, 1, 1, 1), 0.95), torch.full((5, 1, 1, 1), 0.5)]), torch.zeros(10, dtype=torch.int64)
    delta = Perturbation(torch.full((1, 1, 1, 1), 0.6), "hand")
    assert not delta(lambda x: 1.5 * model(x), x, y, threat=Linf(0.6)).success[:5].any()
    with pytest.raises(AssertionError, match=r"robust accuracy is 0\.0%"):
        assert_robust(model, x, y, threat=Linf(0.6), at_least=0.1, attack=delta)
