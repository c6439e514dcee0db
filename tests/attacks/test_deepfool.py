import pytest
import torch
from torch import nn

from robustkit import L2, ClassifyAs, Linf, Pixels, Target
from robustkit.attacks import DeepFool
from robustkit.errors import ArgumentError

torch.manual_seed(0)
NET = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 5)).double()
X = torch.rand(9, 1, 8, 8, dtype=torch.float64)
Y = NET(X).argmax(1)
UNBOUNDED = {Linf: Linf(1e6, bounds=None), L2: L2(1e6, bounds=None)}


def reference_deepfool(x, y, norm, steps=50, overshoot=0.02):
    """Algorithm 2 of the paper for one image, class by class, independent of the package."""
    q = {Linf: 1, L2: 2}[norm]
    total, point = torch.zeros_like(x), x
    for _ in range(steps):
        point = point.detach().requires_grad_()
        logits = NET(point[None])[0]
        if logits.argmax() != y:
            break
        grads = [torch.autograd.grad(logit, point, retain_graph=True)[0] for logit in logits]
        steps_to = []
        for k in range(5):
            if k != y:
                w, f = grads[k] - grads[y], float((logits[y] - logits[k]).detach())
                length = f / float(w.norm(q))
                steps_to.append((length, w.sign() if norm is Linf else w / w.norm()))
        length, direction = min(steps_to, key=lambda step: step[0])
        total = total + length * direction
        point = x + (1 + overshoot) * total
    return point.detach()


@pytest.mark.parametrize("norm", [Linf, L2])
def test_deepfool_equals_algorithm_2(norm):
    ours = DeepFool()(NET, X, Y, threat=UNBOUNDED[norm])
    assert ours.success.all()
    theirs = torch.stack([reference_deepfool(x, int(y), norm) for x, y in zip(X, Y, strict=True)])
    assert torch.allclose(ours.x_adv, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", [Linf, L2])
def test_on_linear_classes_one_step_reaches_the_nearest_boundary(norm):
    """With several classes too: its length is the closed-form distance to the nearest hyperplane plus 2 %."""
    weight, bias = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    x = torch.randn(20, 6, dtype=torch.float64)
    net = nn.Linear(6, 4).double()
    net.load_state_dict({"weight": weight, "bias": bias})
    scores = x @ weight.T + bias
    y = scores.argmax(1)
    q = {Linf: 1, L2: 2}[norm]
    others = torch.stack(
        [(scores.gather(1, y[:, None])[:, 0] - scores[:, k]) / (weight[k] - weight[y]).norm(q, 1) for k in range(4)]
    )
    distance = others.nan_to_num(torch.inf).where(torch.arange(4)[:, None] != y, torch.inf).amin(0)
    result = DeepFool(steps=1)(net, x, y, threat=UNBOUNDED[norm])
    assert result.success.all()
    assert torch.allclose(result.size, 1.02 * distance, rtol=1e-9)


def test_a_target_class_is_reached_across_its_own_boundary():
    """Of three classes the target is not the nearest."""
    net = nn.Linear(2, 3, bias=False).double()
    net.load_state_dict({"weight": torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 1.0]], dtype=torch.float64)})
    x, target = torch.tensor([[-0.1, -1.0]], dtype=torch.float64), torch.tensor([2])
    result = DeepFool()(net, x, target, goal=ClassifyAs(), threat=UNBOUNDED[L2])
    assert result.success.all()
    assert torch.allclose(result.x_adv, torch.tensor([[-0.1, 0.02]], dtype=torch.float64), atol=1e-9)


def test_a_tied_example_leaves_the_boundary():
    net = nn.Linear(2, 2, bias=False)
    net.load_state_dict({"weight": torch.tensor([[1.0, 0.0], [0.0, 1.0]])})
    x = torch.full((1, 2), 0.5)
    assert DeepFool()(net, x, net(x).argmax(1), threat=L2(0.1)).success.all()


@pytest.mark.parametrize("without_gradient", [lambda x: (x > 0.5).double(), torch.round], ids=["no graph", "zero gradient"])
def test_a_model_without_a_gradient_is_flagged(without_gradient):
    result = DeepFool(steps=5)(lambda x: NET(without_gradient(x)), X, NET(without_gradient(X)).argmax(1), threat=Linf(0.01))
    assert "flat-gradients" in [flag.name for flag in result.flags]


def test_the_costs_are_counted():
    """A step costs one forward pass and one backward pass per candidate."""
    result = DeepFool(steps=3, candidates=2)(NET, X, Y, threat=Linf(1e-9))
    assert (result.forwards == 1 + 3 + 1).all()
    assert (result.backwards == 3 * 2).all()


def test_invalid_fields_and_threats_are_refused():
    with pytest.raises(ArgumentError, match="it supports Linf, L2"):
        DeepFool()(NET, X, Y, threat=Pixels(1))
    with pytest.raises(ArgumentError, match="candidates=0"):
        DeepFool(candidates=0)
    with pytest.raises(ArgumentError, match="overshoot=-1"):
        DeepFool(overshoot=-1)


def test_coordinates_blocked_by_the_box_are_left_out_of_the_linear_model():
    """Nine of ten inputs lie at a bound that the step would leave: the tenth alone has to move the whole distance."""
    net = nn.Linear(10, 2, bias=False).double()
    weight = torch.ones(10, dtype=torch.float64)
    net.load_state_dict({"weight": torch.stack([weight, -weight])})
    x = torch.zeros(1, 10, dtype=torch.float64)
    x[0, 9] = 0.4
    shifted = lambda x: net(x) - torch.tensor([0.2, -0.2])  # noqa: E731 - class 0 where the sum exceeds 0.2
    result = DeepFool(steps=1)(shifted, x, torch.tensor([0]), threat=Linf(0.5))
    assert result.success.all()
    assert float(result.size) == pytest.approx(0.204, rel=1e-6)


@pytest.mark.parametrize("sign", [0.8, 1.0])
def test_success_is_decided_by_the_deployed_function(sign):
    """The view crosses its boundary before the deployed function does: the perturbation grows until that crosses too."""
    net = nn.Linear(2, 2, bias=False).double()
    net.load_state_dict({"weight": torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)})
    push = torch.tensor([0.3, -0.3], dtype=torch.float64)
    target = Target(lambda x: net(x), views={"nearer": lambda x: net(sign * x) - push})
    x = torch.tensor([[0.5, 0.1]], dtype=torch.float64)
    result = DeepFool()(target, x, torch.tensor([0]), threat=Linf(2.0, bounds=None))
    assert result.success.all()
    assert float(result.size) < 0.6


def test_on_a_stochastic_model_one_successful_draw_does_not_end_the_attack():
    torch.manual_seed(0)
    net = nn.Linear(20, 2).double()
    x = torch.randn(60, 20, dtype=torch.float64)
    y = net(x).argmax(1)
    noisy = Target(lambda x: net(x) + 0.5 * torch.randn(len(x), 2, dtype=x.dtype), draws=4)
    result = DeepFool(steps=20)(noisy, x, y, threat=UNBOUNDED[L2])
    assert int(result.success.sum()) >= 54
    assert (result.backwards % 4 == 0).all()
