"""What the three universal attacks have in common."""

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
OWN = NET(X).argmax(1)
THREE = [UniversalPGD(epochs=3, batch=8), UniversalDeepFool(passes=3, batch=8), UniversalSingular(images=16)]
each = pytest.mark.parametrize("attack", THREE, ids=lambda attack: type(attack).__name__)


@each
@pytest.mark.parametrize("threat", [Linf(0.15), L2(0.8)], ids=["linf", "l2"])
def test_one_change_for_all_and_the_box_cuts_it_for_each(attack, threat):
    made = attack.learn(NET, X, OWN, threat=threat, seed=3)
    assert made.delta.shape == (1, 1, 8, 8)
    assert float(type(threat)(threat.eps, bounds=None).size(made.delta, torch.zeros_like(made.delta))) <= threat.eps * (
        1 + 1e-6
    )
    result = made(NET, X, OWN, threat=threat, keep="last")
    expected = (X + made.delta).clamp(0, 1)
    assert torch.allclose(result.x_adv, expected, atol=1e-6)
    assert torch.equal(result.success, NET(result.x_adv).argmax(1) != OWN)


@each
def test_labels_do_not_matter_but_wanted_classes_do(attack):
    """Fitted against the model's own answers: wrong labels change nothing; ClassifyAs takes what it is given."""
    one, other = (attack.learn(NET, X, y, threat=Linf(0.15)) for y in (OWN, (OWN + 2) % 5))
    assert torch.equal(one.delta, other.delta)
    wanted = [torch.full_like(OWN, k) for k in (1, 3)]
    aimed = [attack.learn(NET, X, y, goal=ClassifyAs(), threat=Linf(0.3)) for y in wanted]
    hit = torch.tensor(
        [[NET((X + made.delta).clamp(0, 1)).argmax(1).eq(y[0]).float().mean() for y in wanted] for made in aimed]
    )
    assert hit[0, 0] >= hit[1, 0]
    assert hit[1, 1] >= hit[0, 1]
    assert hit.diag().min() > torch.tensor([float((int(y[0]) == OWN).float().mean()) for y in wanted]).max()


@each
def test_calling_it_is_learning_and_putting_on_with_all_costs(attack):
    counter = Counter(NET)
    result = attack(counter, X, OWN, threat=Linf(0.15), seed=1)
    made = attack.learn(NET, X, OWN, threat=Linf(0.15), seed=1)
    assert torch.equal(result.x_adv, made(NET, X, OWN, threat=Linf(0.15), keep="last").x_adv)
    assert int(result.forwards.sum()) == counter.seen == made.forwards + len(X)
    assert int(result.backwards.sum()) == made.backwards > 0
    assert [stage.name for stage in result.stages] == ["learning", "attack"]


@each
def test_the_same_examples_in_another_order_and_in_other_batches_give_the_same_change(attack):
    turned = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(40) + 7
    one = attack.learn(NET, X, OWN, threat=Linf(0.15), ids=ids)
    other = attack.learn(Target(NET, batch_size=64), X[turned], OWN[turned], threat=Linf(0.15), ids=ids[turned])
    assert torch.allclose(one.delta, other.delta, atol=1e-6)


@each
def test_a_half_precision_and_a_double_model_are_served(attack):
    for dtype in (torch.bfloat16, torch.float64):
        net, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).to(dtype), X.to(dtype)
        y = net(x).argmax(1)
        result = attack(net, x, y, threat=Linf(0.15))
        assert result.x_adv.dtype == dtype
        assert Linf(0.15).contains(result.x_adv.double(), x.double()).all()


@each
def test_bad_input_is_refused_in_one_line(attack):
    with pytest.raises(ArgumentError, match=r"x holds no example; .* at least one"):
        attack.learn(NET, X[:0], OWN[:0], threat=Linf(0.1))
    with pytest.raises(ArgumentError, match="serves Linf, L2"):
        attack.learn(NET, X, OWN, threat=L1(1.0))


@each
def test_those_that_were_wrong_before_get_the_change_too(attack):
    """Under "first" any other attack leaves an image that is wrong anyway as it is."""
    wrong = (OWN + 1) % 5
    result = attack(NET, X, wrong, threat=Linf(0.15))
    assert (result.size > 0.1).all()


def test_a_change_is_saved_and_loaded_and_drawn(tmp_path):
    made = UniversalPGD(epochs=1).learn(NET, X, OWN, threat=Linf(0.15))
    made.save(tmp_path / "delta.safetensors")
    again = Perturbation.load(tmp_path / "delta.safetensors")
    assert torch.equal(again.delta, made.delta)
    assert (again.recipe, again.forwards, again.backwards) == (made.recipe, made.forwards, made.backwards)
    assert repr(again) == "Perturbation(1x8x8 by UniversalPGD(epochs=1, batch=32, reach=2.0, clamp=3.0, starts=4))"
    drawn = Perturbation(torch.tensor([[[[-0.1, 0.0], [0.05, 0.1]]]]), "hand").picture()
    assert np.array_equal(drawn, [[0, 128], [191, 255]])
    (tmp_path / "no").write_text("x")
    with pytest.raises(ArgumentError, match="is no perturbation written by"):
        Perturbation.load(tmp_path / "no")


def test_a_change_of_another_shape_is_refused():
    made = Perturbation(torch.zeros(1, 3, 8, 8), "hand")
    with pytest.raises(ShapeError, match=r"\(40, 1, 8, 8\), the perturbation \(1, 3, 8, 8\)"):
        made(NET, X, OWN, threat=Linf(0.1))
    with pytest.raises(ShapeError, match="must be floating"):
        Perturbation(torch.zeros(3, 8, 8), "hand")
    with pytest.raises(ShapeError, match="cannot be drawn"):
        Perturbation(torch.zeros(1, 5), "hand").picture()


def test_a_smaller_budget_cuts_the_change():
    made = Perturbation(torch.full((1, 1, 8, 8), 0.3), "hand")
    result = made(NET, X, OWN, threat=Linf(torch.linspace(0.05, 0.3, 40)), keep="last")
    assert torch.allclose(result.x_adv, (X + torch.linspace(0.05, 0.3, 40)[:, None, None, None]).clamp(0, 1), atol=1e-6)


def test_memory_that_runs_out_halves_the_batches_of_learning_too():
    class Greedy(nn.Module):
        def forward(self, x):
            if len(x) > 10:
                raise torch.OutOfMemoryError("out of memory")
            return NET(x)

    result = UniversalPGD(epochs=1, batch=8)(Greedy().eval(), X, OWN, threat=Linf(0.15))
    assert {note.name for note in result.notes} == {"batch-halved"}
    assert torch.equal(result.x_adv, UniversalPGD(epochs=1, batch=8)(NET, X, OWN, threat=Linf(0.15)).x_adv)


def test_a_universal_attack_of_ones_own_needs_only_fit():
    class Grey(UniversalAttack):
        def fit(self, problem):
            return torch.full_like(problem.x[:1], 0.1)

    assert torch.allclose(Grey().perturb(NET, X, OWN, goal=Misclassify(), threat=Linf(0.1)), (X + 0.1).clamp(0, 1))


@each
def test_a_change_that_was_learned_without_gradients_says_so_wherever_it_is_used(attack, tmp_path):
    """Rounding has a gradient of zero: what such a change leaves is no robustness, here and in any later run."""
    rounded = lambda x: NET((x * 7).round() / 7)  # noqa: E731
    assert "flat-gradients" in [flag.name for flag in attack(rounded, X, rounded(X).argmax(1), threat=Linf(0.05)).flags]
    made = attack.learn(rounded, X, rounded(X).argmax(1), threat=Linf(0.05))
    made.save(tmp_path / "delta")
    for change in (made, Perturbation.load(tmp_path / "delta")):
        assert [flag.name for flag in change(NET, X, OWN, threat=Linf(0.05)).flags] == ["flat-gradients"]
    assert attack.learn(NET, X, OWN, threat=Linf(0.05))(NET, X, OWN, threat=Linf(0.05)).flags == ()


@each
def test_no_more_images_at_once_than_the_target_allows(attack):
    seen = []

    def watched(x):
        seen.append(len(x))
        return NET(x)

    attack.learn(Target(watched, NET, batch_size=3), X, OWN, threat=Linf(0.15))
    assert max(seen) == 3


@each
def test_one_infinite_derivative_does_not_disable_the_attack_in_silence(attack):
    """sqrt(x)^2 is x, and has no finite derivative at 0: a black pixel in every image."""
    x = X.clone()
    x[:, :, 0, 0] = 0
    odd = lambda x: NET(x.sqrt() ** 2)  # noqa: E731
    results = [attack(net, x, NET(x).argmax(1), threat=Linf(0.2)) for net in (odd, NET)]
    fooled = [result.success.float().mean() for result in results]
    assert fooled[0] > 0.5 * fooled[1] > 0 or [flag.name for flag in results[0].flags] == ["flat-gradients"]


def test_an_attack_that_writes_to_what_it_is_judged_by_is_refused():
    class Learns(UniversalAttack):
        def fit(self, problem):
            problem.x.add_(0)
            return torch.zeros_like(problem.x[:1])

    class Runs(Attack):
        def run(self, problem):
            problem.ref.add_(0)
            return problem.x

    for attack in (Learns(), Runs()):
        with pytest.raises(ArgumentError, match=r"wrote to problem.x or problem.ref"):
            attack(NET, X.clone(), OWN.clone(), goal=ClassifyAs(), threat=Linf(0.1))
        with pytest.raises(ArgumentError, match=r"wrote to problem.x or problem.ref"):
            attack.perturb(NET, X.clone(), OWN.clone(), goal=ClassifyAs(), threat=Linf(0.1))


def test_a_change_that_is_no_number_is_refused():
    with pytest.raises(ArgumentError, match="not finite"):
        Perturbation(torch.full((1, 1, 8, 8), torch.nan), "hand")
