import math

import pytest
import torch
from torch import nn

from robustkit import FGSM, L2, PGD, Linf, Target
from robustkit.attack import Attack
from robustkit.errors import ArgumentError, ShapeError
from robustkit.goals import Misclassify
from robustkit.testing.nets import Counter

torch.manual_seed(0)
NET = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
X = torch.rand(6, 1, 4, 4)
Y = NET(X).argmax(1)


def attack(x=X, y=Y, net=NET, by=FGSM(), threat=Linf(0.1), **options):
    return by(net, x, y, threat=threat, **options)


def test_an_example_that_is_wrong_anyway_costs_one_forward():
    wrong = (Y + 1) % 3
    result = attack(y=wrong)
    assert result.success.all()
    assert torch.equal(result.x_adv, X)
    assert result.forwards.tolist() == [1] * 6
    assert result.backwards.tolist() == [0] * 6
    assert not torch.equal(attack(y=wrong, keep="last").x_adv, X)  # "last" attacks it all the same


def test_fgsm_costs_a_look_a_step_and_a_verdict():
    result = attack()
    assert result.forwards.tolist() == [3] * 6
    assert result.backwards.tolist() == [1] * 6
    assert [(s.name, s.forwards, s.backwards, s.solved) for s in result.stages] == [
        ("clean", 6, 0, 0),
        ("attack", 12, 6, int(result.success.sum())),
    ]


def test_perturb_is_the_last_iterate_unjudged():
    counter = Counter(NET)
    x_adv = PGD(steps=4).perturb(counter, X, Y, threat=Linf(0.1), seed=3)
    assert counter.seen == 24
    assert torch.equal(x_adv, PGD(steps=4)(NET, X, Y, threat=Linf(0.1), seed=3, keep="last").x_adv)


def test_micro_batches_change_nothing_but_the_batches():
    whole, parts = attack(by=PGD(steps=4)), attack(net=Target(NET, batch_size=4), by=PGD(steps=4))
    torch.testing.assert_close(whole.x_adv, parts.x_adv)
    assert torch.equal(whole.success, parts.success)


def test_when_memory_runs_out_the_batch_is_halved_and_it_is_said():
    seen = []

    def greedy(x):
        seen.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return NET(x)

    result = attack(net=greedy)
    assert max(seen[1:]) == 3
    assert torch.equal(result.x_adv, attack().x_adv)
    assert [note.name for note in result.notes] == ["batch-halved"]
    with pytest.raises(RuntimeError, match="the model's own"):
        attack(net=lambda x: (_ for _ in ()).throw(RuntimeError("the model's own")))


def test_a_model_in_training_mode_is_held_in_evaluation_mode_and_flagged():
    net = nn.Sequential(NET, nn.BatchNorm1d(3), nn.Dropout(0.5))
    net.eval()
    calm = attack(net=net)
    net.train()
    held = attack(net=net)
    assert torch.equal(held.x_adv, calm.x_adv)
    assert net.training
    assert [flag.name for flag in held.flags] == ["train-mode"]
    assert calm.flags == ()
    assert attack(net=Target(net, mode="train")).flags == ()


def test_types_follow_the_input():
    double = attack(x=X.double(), net=NET.double())
    assert double.x_adv.dtype == torch.float64
    NET.float()
    half = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).to(torch.bfloat16)
    x = X.to(torch.bfloat16)
    result = attack(x=x, y=half(x).argmax(1), net=half, by=PGD(steps=5), threat=L2(1.0))
    assert result.x_adv.dtype == torch.bfloat16
    assert torch.equal(result.success, half(result.x_adv).argmax(1) != half(x).argmax(1))
    assert (result.size <= 1.0).all()
    wide = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    wide.load_state_dict({name: value.float() for name, value in half.state_dict().items()})
    hold = ((wide(result.x_adv.float()).argmax(1) != half(x).argmax(1)) & result.success).sum()
    assert f"judged in bfloat16; with the same weights in float32 {hold} of {result.success.sum()}" in result.notes[0].why
    assert next(half.parameters()).dtype == torch.bfloat16


def test_one_eps_an_example():
    eps = torch.tensor([0.01, 0.3, 0.01, 0.3, 0.2, 0.2])
    result = attack(threat=Linf(eps), keep="last", by=PGD(steps=5), net=Target(NET, batch_size=4))
    assert (result.size <= eps.double() + 1e-7).all()
    assert (result.size > 0.9 * eps.double()).all()


def test_vectors_are_inputs_too():
    net = nn.Linear(5, 2)
    x = torch.rand(3, 5)
    result = PGD(steps=3)(net, x, net(x).argmax(1), threat=L2(5.0, bounds=None))
    assert result.success.all()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": (X * 255).byte()}, ArgumentError, "255"),
        ({"x": X * 2 - 1}, ArgumentError, "normalisation inside the model"),
        ({"x": X * math.nan}, ArgumentError, "outside bounds"),
        ({"x": None}, ArgumentError, "NoneType"),
        ({"y": Y[:3]}, ShapeError, "one row an example"),
        ({"y": Y.tolist()}, ShapeError, "list"),
        ({"y": Y.float()}, ShapeError, "int64"),
        ({"y": Y + 7}, ShapeError, r"\[0, 3\)"),
        ({"seed": "one"}, ArgumentError, "seed='one'"),
        ({"ids": torch.arange(5)}, ShapeError, r"\(6,\)"),
        ({"ids": torch.rand(6)}, ShapeError, "int64"),
        ({"threat": Linf(torch.full((5,), 0.1))}, ShapeError, "one an example"),
        ({"keep": "all"}, ArgumentError, "first, best, smallest, last"),
        ({"net": 3}, ArgumentError, "callable"),
        ({"net": lambda x: (NET(x), 1)}, ShapeError, "tuple"),
        ({"net": lambda x: None}, ShapeError, "NoneType"),
        ({"net": lambda x: NET(x)[:3]}, ShapeError, r"\(3, 3\)"),
    ],
)
def test_senseless_calls_are_refused(change, error, words):
    with pytest.raises(error, match=words):
        attack(**change)


def test_an_attack_that_returns_another_shape_is_told():
    class Crops(Attack):
        def run(self, problem):
            return problem.x[:, :, 1:]

    with pytest.raises(ShapeError, match="the attack returned shape"):
        Crops()(NET, X, Y, threat=Linf(0.1))


def test_an_attack_that_leaves_the_threat_is_brought_back():
    class Leaves(Attack):
        def run(self, problem):
            return 1 - problem.x

    result = Leaves()(NET, X, Y, threat=Linf(0.1), goal=Misclassify())
    assert Linf(0.1).contains(result.x_adv, X).all()


def test_not_a_number_is_no_adversarial_image():
    class Lost(Attack):
        def run(self, problem):
            return problem.x * math.nan

    result = Lost()(NET, X, Y, threat=Linf(0.1), keep="last")
    assert torch.equal(result.x_adv, X)
    assert not result.success.any()


def test_a_module_behind_a_function_is_held_too():
    net = nn.Sequential(NET, nn.BatchNorm1d(3)).train()
    result = attack(net=lambda x: net(x), by=PGD(steps=3))
    assert [flag.name for flag in result.flags] == ["train-mode"]
    assert torch.equal(net[1].running_mean, torch.zeros(3))
    assert net[1].training
