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
WIDE = {Linf: Linf(1e6, bounds=None), L2: L2(1e6, bounds=None)}


def by_hand(x, y, norm, steps=50, overshoot=0.02):
    """Algorithm 2 of the paper for one image, class by class, with nothing of the package in it."""
    q = {Linf: 1, L2: 2}[norm]
    total, point = torch.zeros_like(x), x
    for _ in range(steps):
        point = point.detach().requires_grad_()
        logits = NET(point[None])[0]
        if logits.argmax() != y:
            break
        grads = [torch.autograd.grad(logit, point, retain_graph=True)[0] for logit in logits]
        ways = []
        for k in range(5):
            if k != y:
                w, f = grads[k] - grads[y], float((logits[y] - logits[k]).detach())
                length = f / float(w.norm(q))
                ways.append((length, w.sign() if norm is Linf else w / w.norm()))
        length, direction = min(ways, key=lambda way: way[0])
        total = total + length * direction
        point = x + (1 + overshoot) * total
    return point.detach()


@pytest.mark.parametrize("norm", [Linf, L2])
def test_deepfool_is_the_loop_of_the_paper(norm):
    ours = DeepFool()(NET, X, Y, threat=WIDE[norm])
    assert ours.success.all()
    theirs = torch.stack([by_hand(x, int(y), norm) for x, y in zip(X, Y, strict=True)])
    assert torch.allclose(ours.x_adv, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", [Linf, L2])
def test_on_linear_classes_one_step_goes_to_the_nearest_border(norm):
    """With several classes too: the distance to the nearest of the hyperplanes, in closed form, and 2 % more."""
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
    result = DeepFool(steps=1)(net, x, y, threat=WIDE[norm])
    assert result.success.all()
    assert torch.allclose(result.size, 1.02 * distance, rtol=1e-9)


def test_a_wanted_class_is_reached_by_its_own_border():
    """One hyperplane between two classes of three: the third, though nearer, is not what is wanted."""
    net = nn.Linear(2, 3, bias=False).double()
    net.load_state_dict({"weight": torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 1.0]], dtype=torch.float64)})
    x, wanted = torch.tensor([[-0.1, -1.0]], dtype=torch.float64), torch.tensor([2])
    result = DeepFool()(net, x, wanted, goal=ClassifyAs(), threat=WIDE[L2])
    assert result.success.all()
    assert torch.allclose(result.x_adv, torch.tensor([[-0.1, 0.02]], dtype=torch.float64), atol=1e-9)


def test_a_tie_is_left():
    net = nn.Linear(2, 2, bias=False)
    net.load_state_dict({"weight": torch.tensor([[1.0, 0.0], [0.0, 1.0]])})
    x = torch.full((1, 2), 0.5)
    assert DeepFool()(net, x, net(x).argmax(1), threat=L2(0.1)).success.all()


@pytest.mark.parametrize("blind", [lambda x: (x > 0.5).double(), torch.round], ids=["no graph", "zero gradient"])
def test_a_model_without_gradient_is_told_apart_from_a_robust_one(blind):
    result = DeepFool(steps=5)(lambda x: NET(blind(x)), X, NET(blind(X)).argmax(1), threat=Linf(0.01))
    assert "flat-gradients" in [flag.name for flag in result.flags]


def test_costs():
    """A step is one forward and a gradient for each candidate."""
    result = DeepFool(steps=3, candidates=2)(NET, X, Y, threat=Linf(1e-9))
    assert (result.forwards == 1 + 3 + 1).all()
    assert (result.backwards == 3 * 2).all()


def test_bad_values_are_refused():
    with pytest.raises(ArgumentError, match="serves Linf, L2"):
        DeepFool()(NET, X, Y, threat=Pixels(1))
    with pytest.raises(ArgumentError, match="candidates=0"):
        DeepFool(candidates=0)
    with pytest.raises(ArgumentError, match="overshoot=-1"):
        DeepFool(overshoot=-1)


def test_where_the_box_holds_coordinates_fast_the_border_is_sought_with_the_others():
    """Ten inputs, nine of them at the edge that the gradient points out of: the tenth alone has to go the whole way."""
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
def test_an_example_is_done_when_the_deployed_function_says_so(sign):
    """The view crosses its border before the deployed function does: the change grows until that is content too."""
    net = nn.Linear(2, 2, bias=False).double()
    net.load_state_dict({"weight": torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)})
    push = torch.tensor([0.3, -0.3], dtype=torch.float64)
    target = Target(lambda x: net(x), views={"nearer": lambda x: net(sign * x) - push})
    x = torch.tensor([[0.5, 0.1]], dtype=torch.float64)
    result = DeepFool()(target, x, torch.tensor([0]), threat=Linf(2.0, bounds=None))
    assert result.success.all()
    assert float(result.size) < 0.6


def test_on_a_random_model_one_lucky_draw_is_no_reason_to_stop():
    torch.manual_seed(0)
    net = nn.Linear(20, 2).double()
    x = torch.randn(60, 20, dtype=torch.float64)
    y = net(x).argmax(1)
    noisy = Target(lambda x: net(x) + 0.5 * torch.randn(len(x), 2, dtype=x.dtype), draws=4)
    result = DeepFool(steps=20)(noisy, x, y, threat=WIDE[L2])
    assert int(result.success.sum()) >= 54
    assert (result.backwards % 4 == 0).all()
