"""Properties of all three universal attacks."""

import numpy as np
import pytest
import torch
from torch import nn

from robustkit import L1, L2, Attack, ClassifyAs, Linf, Misclassify, Target
from robustkit.attacks import Perturbation, UniversalDeepFool, UniversalPGD, UniversalSingular
from robustkit.attacks.universal import UniversalAttack
from robustkit.errors import ArgumentError, ShapeError
from robustkit.testing.nets import Counter

torch.manual_seed(0)
NET = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 5)).eval()
X = torch.rand(40, 1, 8, 8)
PREDICTED = NET(X).argmax(1)
UNIVERSAL = [UniversalPGD(epochs=3, batch=8), UniversalDeepFool(passes=3, batch=8), UniversalSingular(images=16)]
each = pytest.mark.parametrize("attack", UNIVERSAL, ids=lambda attack: type(attack).__name__)


@each
@pytest.mark.parametrize("threat", [Linf(0.15), L2(0.8)], ids=["linf", "l2"])
def test_one_perturbation_is_added_to_all_and_clamped_for_each(attack, threat):
    learned = attack.learn(NET, X, PREDICTED, threat=threat, seed=3)
    assert learned.delta.shape == (1, 1, 8, 8)
    assert float(type(threat)(threat.eps, bounds=None).size(learned.delta, torch.zeros_like(learned.delta))) <= threat.eps * (
        1 + 1e-6
    )
    result = learned(NET, X, PREDICTED, threat=threat, keep="last")
    expected = (X + learned.delta).clamp(0, 1)
    assert torch.allclose(result.x_adv, expected, atol=1e-6)
    assert torch.equal(result.success, NET(result.x_adv).argmax(1) != PREDICTED)


@each
def test_labels_do_not_matter_but_target_classes_do(attack):
    """The reference is the model's own prediction, so wrong labels change nothing; ClassifyAs uses the given classes."""
    one, other = (attack.learn(NET, X, y, threat=Linf(0.15)) for y in (PREDICTED, (PREDICTED + 2) % 5))
    assert torch.equal(one.delta, other.delta)
    targets = [torch.full_like(PREDICTED, k) for k in (1, 3)]
    targeted = [attack.learn(NET, X, y, goal=ClassifyAs(), threat=Linf(0.3)) for y in targets]
    hit_rate = torch.tensor(
        [[NET((X + learned.delta).clamp(0, 1)).argmax(1).eq(y[0]).float().mean() for y in targets] for learned in targeted]
    )
    assert hit_rate[0, 0] >= hit_rate[1, 0]
    assert hit_rate[1, 1] >= hit_rate[0, 1]
    assert hit_rate.diag().min() > torch.tensor([float((int(y[0]) == PREDICTED).float().mean()) for y in targets]).max()


@each
def test_a_call_learns_and_applies_and_counts_both_costs(attack):
    counter = Counter(NET)
    result = attack(counter, X, PREDICTED, threat=Linf(0.15), seed=1)
    learned = attack.learn(NET, X, PREDICTED, threat=Linf(0.15), seed=1)
    assert torch.equal(result.x_adv, learned(NET, X, PREDICTED, threat=Linf(0.15), keep="last").x_adv)
    assert int(result.forwards.sum()) == counter.seen == learned.forwards + len(X)
    assert int(result.backwards.sum()) == learned.backwards > 0
    assert [stage.name for stage in result.stages] == ["learning", "attack"]


@each
def test_the_perturbation_does_not_depend_on_order_or_batch_size(attack):
    permutation = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(40) + 7
    one = attack.learn(NET, X, PREDICTED, threat=Linf(0.15), ids=ids)
    other = attack.learn(
        Target(NET, batch_size=64), X[permutation], PREDICTED[permutation], threat=Linf(0.15), ids=ids[permutation]
    )
    assert torch.allclose(one.delta, other.delta, atol=1e-6)


@each
def test_half_precision_and_double_models_are_supported(attack):
    for dtype in (torch.bfloat16, torch.float64):
        net, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).to(dtype), X.to(dtype)
        y = net(x).argmax(1)
        result = attack(net, x, y, threat=Linf(0.15))
        assert result.x_adv.dtype == dtype
        assert Linf(0.15).contains(result.x_adv.double(), x.double()).all()


@each
def test_invalid_input_is_refused(attack):
    with pytest.raises(ArgumentError, match=r"x holds no example; .* at least one"):
        attack.learn(NET, X[:0], PREDICTED[:0], threat=Linf(0.1))
    with pytest.raises(ArgumentError, match="it supports Linf, L2"):
        attack.learn(NET, X, PREDICTED, threat=L1(1.0))


@each
def test_misclassified_examples_are_perturbed_too(attack):
    """With keep="first" other attacks leave misclassified examples unchanged."""
    wrong = (PREDICTED + 1) % 5
    result = attack(NET, X, wrong, threat=Linf(0.15))
    assert (result.size > 0.1).all()


def test_a_perturbation_is_saved_loaded_and_drawn(tmp_path):
    learned = UniversalPGD(epochs=1).learn(NET, X, PREDICTED, threat=Linf(0.15))
    learned.save(tmp_path / "delta.safetensors")
    again = Perturbation.load(tmp_path / "delta.safetensors")
    assert torch.equal(again.delta, learned.delta)
    assert (again.recipe, again.forwards, again.backwards) == (learned.recipe, learned.forwards, learned.backwards)
    assert repr(again) == "Perturbation(1x8x8 by UniversalPGD(epochs=1, batch=32, reach=2.0, clamp=3.0, starts=4))"
    picture = Perturbation(torch.tensor([[[[-0.1, 0.0], [0.05, 0.1]]]]), "hand").picture()
    assert np.array_equal(picture, [[0, 128], [191, 255]])
    (tmp_path / "no").write_text("x")
    with pytest.raises(ArgumentError, match="is no file written by"):
        Perturbation.load(tmp_path / "no")


def test_a_perturbation_of_another_shape_is_refused():
    learned = Perturbation(torch.zeros(1, 3, 8, 8), "hand")
    with pytest.raises(ShapeError, match=r"\(40, 1, 8, 8\); it must be \(N, 3, 8, 8\) to fit the perturbation"):
        learned(NET, X, PREDICTED, threat=Linf(0.1))
    with pytest.raises(ShapeError, match="must be floating"):
        Perturbation(torch.zeros(3, 8, 8), "hand")
    with pytest.raises(ShapeError, match="cannot be drawn"):
        Perturbation(torch.zeros(1, 5), "hand").picture()


def test_a_smaller_budget_projects_the_perturbation():
    learned = Perturbation(torch.full((1, 1, 8, 8), 0.3), "hand")
    result = learned(NET, X, PREDICTED, threat=Linf(torch.linspace(0.05, 0.3, 40)), keep="last")
    assert torch.allclose(result.x_adv, (X + torch.linspace(0.05, 0.3, 40)[:, None, None, None]).clamp(0, 1), atol=1e-6)


def test_running_out_of_memory_halves_the_batches_of_learning_too():
    class Greedy(nn.Module):
        def forward(self, x):
            if len(x) > 10:
                raise torch.OutOfMemoryError("out of memory")
            return NET(x)

    result = UniversalPGD(epochs=1, batch=8)(Greedy().eval(), X, PREDICTED, threat=Linf(0.15))
    assert {note.name for note in result.notes} == {"batch-halved"}
    assert torch.equal(result.x_adv, UniversalPGD(epochs=1, batch=8)(NET, X, PREDICTED, threat=Linf(0.15)).x_adv)


def test_a_custom_universal_attack_needs_only_fit():
    class Grey(UniversalAttack):
        def fit(self, problem):
            return torch.full_like(problem.x[:1], 0.1)

    assert torch.allclose(Grey().perturb(NET, X, PREDICTED, goal=Misclassify(), threat=Linf(0.1)), (X + 0.1).clamp(0, 1))


@each
def test_a_perturbation_learned_without_gradients_is_flagged_wherever_it_is_used(attack, tmp_path):
    """Rounding has a zero gradient: surviving such a perturbation is no evidence of robustness, now or in a later run."""
    rounded = lambda x: NET((x * 7).round() / 7)  # noqa: E731
    assert "flat-gradients" in [flag.name for flag in attack(rounded, X, rounded(X).argmax(1), threat=Linf(0.05)).flags]
    learned = attack.learn(rounded, X, rounded(X).argmax(1), threat=Linf(0.05))
    learned.save(tmp_path / "delta")
    for perturbation in (learned, Perturbation.load(tmp_path / "delta")):
        assert [flag.name for flag in perturbation(NET, X, PREDICTED, threat=Linf(0.05)).flags] == ["flat-gradients"]
    assert attack.learn(NET, X, PREDICTED, threat=Linf(0.05))(NET, X, PREDICTED, threat=Linf(0.05)).flags == ()


@each
def test_no_batch_exceeds_the_batch_size_of_the_target(attack):
    sizes = []

    def recorded(x):
        sizes.append(len(x))
        return NET(x)

    attack.learn(Target(recorded, NET, batch_size=3), X, PREDICTED, threat=Linf(0.15))
    assert max(sizes) == 3


@each
def test_an_infinite_derivative_does_not_silently_disable_the_attack(attack):
    """sqrt(x)^2 is x, but autograd gives no finite derivative at 0, the value of one pixel in every image."""
    x = X.clone()
    x[:, :, 0, 0] = 0
    through_sqrt = lambda x: NET(x.sqrt() ** 2)  # noqa: E731
    results = [attack(net, x, NET(x).argmax(1), threat=Linf(0.2)) for net in (through_sqrt, NET)]
    rates = [result.success.float().mean() for result in results]
    assert rates[0] > 0.5 * rates[1] > 0 or [flag.name for flag in results[0].flags] == ["flat-gradients"]


def test_an_attack_that_writes_to_the_inputs_or_the_reference_is_refused():
    class WritesInputs(UniversalAttack):
        def fit(self, problem):
            problem.x.add_(0)
            return torch.zeros_like(problem.x[:1])

    class WritesReference(Attack):
        def run(self, problem):
            problem.ref.add_(0)
            return problem.x

    for attack in (WritesInputs(), WritesReference()):
        with pytest.raises(ArgumentError, match=r"wrote to problem.x or problem.ref"):
            attack(NET, X.clone(), PREDICTED.clone(), goal=ClassifyAs(), threat=Linf(0.1))
        with pytest.raises(ArgumentError, match=r"wrote to problem.x or problem.ref"):
            attack.perturb(NET, X.clone(), PREDICTED.clone(), goal=ClassifyAs(), threat=Linf(0.1))


def test_a_perturbation_with_nan_is_refused():
    with pytest.raises(ArgumentError, match="not finite"):
        Perturbation(torch.full((1, 1, 8, 8), torch.nan), "hand")
