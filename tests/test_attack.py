import copy
import math
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from robustkit import FGSM, L2, PGD, Linf, Target, UniversalPGD
from robustkit._engine.ledger import Check, Message
from robustkit.attack import Attack
from robustkit.errors import ArgumentError, ShapeError
from robustkit.goals import Misclassify
from robustkit.testing.nets import Counter

torch.manual_seed(0)
NET = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
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
    assert result.solver.tolist() == [1 if success else -1 for success in result.success]


@dataclass(frozen=True)
class TwoStages(Attack):
    """Half of the examples in one named stage, and then a random point of all, outside of any."""

    def run(self, problem):
        with problem.stage("jump"):
            first = problem[: len(problem) // 2]
            _, grad = first.loss_and_grad(first.x)
            first.success(first.threat.steepest(-grad, first.x))
        problem.record_check("odd", len(problem) // 2, len(problem))
        problem.add_note("halves", "only half was tried")
        assert problem.cost.tolist() == [5, 5, 5, 1, 1, 1]
        return problem.start()


def test_stages_of_an_attack_are_booked_apart_and_say_who_was_solved_where():
    result = TwoStages()(NET, X, Y, threat=Linf(1.0))
    assert result.success.tolist() == [True, True, True, False, True, True]
    assert [(s.name, s.forwards, s.backwards, s.solved) for s in result.stages] == [
        ("clean", 6, 0, 0),
        ("jump", 6, 3, 3),
        ("attack", 6, 0, 2),  # the verdict on all
    ]
    assert result.solver.tolist() == [1, 1, 1, -1, 2, 2]
    assert result.checks == (Check("odd", 3, 6),)
    assert Message("halves", "only half was tried") in result.notes


@pytest.mark.parametrize("keep", ["first", "best", "smallest", "last"])
def test_nothing_in_nothing_out(keep):
    result = attack(x=X[:0], y=Y[:0], keep=keep)
    assert len(result) == 0
    assert result.x_adv.shape == X[:0].shape
    assert result.forwards.dtype == torch.int64
    assert PGD().perturb(NET, X[:0], Y[:0], threat=Linf(0.1)).shape == X[:0].shape


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
    net = nn.Sequential(copy.deepcopy(NET), nn.BatchNorm1d(3), nn.Dropout(0.5))
    net.eval()
    calm = attack(net=net)
    net.train()
    held = attack(net=net)
    assert torch.equal(held.x_adv, calm.x_adv)
    assert net.training
    assert [flag.name for flag in held.flags] == ["train-mode"]
    assert calm.flags == ()
    assert attack(net=Target(net, mode="train", stochastic=True)).flags == ()
    assert [flag.name for flag in attack(net=Target(net, mode="train")).flags] == ["undeclared-randomness"]  # the dropout


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
    assert f"evaluated in bfloat16; with the same weights in float32 {hold} of {result.success.sum()}" in result.notes[0].why
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
        ({"y": Y[:3]}, ShapeError, "one row per example"),
        ({"y": Y.tolist()}, ShapeError, "list"),
        ({"y": Y.float()}, ShapeError, "int64"),
        ({"y": Y + 7}, ShapeError, r"\[0, 3\)"),
        ({"seed": "one"}, ArgumentError, "seed='one'"),
        ({"ids": torch.arange(5)}, ShapeError, r"\(6,\)"),
        ({"ids": torch.rand(6)}, ShapeError, "int64"),
        ({"threat": Linf(torch.full((5,), 0.1))}, ShapeError, "one per example"),
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
    net = nn.Sequential(copy.deepcopy(NET), nn.BatchNorm1d(3)).train()
    result = attack(net=lambda x: net(x), by=PGD(steps=3))
    assert [flag.name for flag in result.flags] == ["train-mode"]
    assert torch.equal(net[1].running_mean, torch.zeros(3))
    assert net[1].training


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_gradients_are_taken_wherever_the_caller_stands(mode):
    outside = attack(by=PGD(steps=3))
    with mode():
        inside = attack(by=PGD(steps=3))
        born_there = attack(x=X + 0, by=PGD(steps=3, random_start=False))
        perturbed = PGD(steps=3).perturb(NET, X + 0, Y + 0, threat=Linf(0.1))
    assert torch.equal(inside.x_adv, outside.x_adv)
    assert torch.equal(inside.success, outside.success)
    assert inside.flat.sum() == born_there.flat.sum() == 0
    assert torch.equal(perturbed, PGD(steps=3).perturb(NET, X, Y, threat=Linf(0.1)))


def test_inputs_with_a_history_leave_none_behind():
    x = X.clone().requires_grad_()
    result = attack(x=x * 1, by=PGD(steps=3), threat=L2(0.5))
    assert not result.x_adv.requires_grad
    assert not result.size.requires_grad
    assert x.grad is None


def test_normalised_inputs_may_differ_from_their_bounds_by_a_rounding():
    mean, std = 0.1307, 0.3081
    threat, x = Linf(0.1, bounds=((0 - mean) / std, (1 - mean) / std)), (X.round() - mean) / std
    assert threat.contains(attack(x=x, threat=threat).x_adv, threat.clamp(x)).all()


def test_a_caller_may_go_back_through_its_own_graph_afterwards():
    """`perturb` between the forward and the backward of the caller, the model held in training mode."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3)).train()
    loss = nn.functional.cross_entropy(net(X), Y)
    statistics = net[2].running_mean.clone()
    PGD(steps=2).perturb(Target(net, mode="train"), X, Y, threat=Linf(0.1))
    loss.backward()
    assert torch.equal(net[2].running_mean, statistics)


def test_modes_are_set_without_calling_train():
    """LoRA layers merge their weights in `train()`: called by us, the merge would stay."""

    class Merges(nn.Linear):
        merged = 0

        def train(self, mode=True):
            self.merged += 1
            return super().train(mode)

    layer = Merges(16, 3)
    attack(net=nn.Sequential(nn.Flatten(), layer))
    assert layer.merged == 0


def test_scripted_modules_are_attacked_and_restored():
    plain = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3)).eval()
    with warnings.catch_warnings(action="ignore"):  # torch would rather have people export
        scripted = torch.jit.trace(plain, X)
    assert torch.equal(attack(net=scripted).x_adv, attack(net=plain).x_adv)
    before = {name: buffer.clone() for name, buffer in scripted.named_buffers()}
    attack(net=Target(scripted, mode="train"))
    assert all(torch.equal(buffer, before[name]) for name, buffer in scripted.named_buffers())


def test_flat_gradients_of_what_was_not_broken_are_an_alarm():
    masked = attack(net=lambda x: NET(x) * 1e6, by=PGD(steps=3), threat=Linf(0.001))
    assert [flag.name for flag in masked.flags] == ["flat-gradients"]
    assert attack(by=PGD(steps=3), threat=Linf(0.001)).flags == ()


def test_smallest_costs_one_forward_too_where_nothing_need_change():
    assert attack(y=(Y + 1) % 3, keep="smallest", by=PGD(steps=3)).forwards.tolist() == [1] * 6


def test_an_undefined_loss_loses_no_success():
    def undefined(x):
        return NET(x) + torch.where(x.flatten(1)[:, :1] > 0.5, math.nan, 0.0)

    y = undefined(X * 0.4).argmax(1)
    for keep in ("first", "best", "smallest"):
        result = attack(x=X * 0.4 + 0.05, y=y, net=undefined, threat=Linf(0.5), keep=keep, by=PGD(steps=4, reach=8))
        assert result.success.all(), keep


@pytest.mark.parametrize(
    ("change", "words"),
    [({"threat": 0.1}, "Linf"), ({"threat": Linf}, "threat="), ({"goal": Misclassify}, "goal="), ({"ids": [1]}, "list")],
)
def test_things_of_the_wrong_kind_are_refused(change, words):
    with pytest.raises((ArgumentError, ShapeError), match=words):
        attack(**change)


# --- starts --------------------------------------------------------------------------------------------------------------

AXIS = nn.Linear(2, 2, bias=False)  # class 1 where the first coordinate is above the second
AXIS.weight.data = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
POINTS = torch.tensor([[0.5, 0.4], [0.5, 0.4], [0.5, 0.4], [0.5, 0.4], [0.3, 0.4]])
ONES = torch.ones(5, dtype=torch.int64)
NAN = math.nan


@dataclass(frozen=True)
class Lazy(Attack):
    """Asks `asks` times about x, and stays there."""

    asks: int = 2

    def run(self, problem):
        for _ in problem.steps(self.asks):
            problem.loss(problem.x)
        return problem.x


def test_starts_are_asked_first_and_who_is_broken_by_them_leaves():
    """By hand: a start that breaks, one outside that breaks once it is inside, one that does not break, none, wrong anyway."""
    starts = torch.tensor([[0.45, 0.47], [0.0, 1.0], [0.5, 0.45], [NAN, NAN], [0.3, 0.4]])
    counter = Counter(AXIS)
    result = Lazy()(counter, POINTS, ONES, threat=Linf(0.1), starts=starts)
    assert result.success.tolist() == [True, True, False, False, True]
    torch.testing.assert_close(result.x_adv, torch.tensor([[0.45, 0.47], [0.4, 0.5], [0.5, 0.4], [0.5, 0.4], [0.3, 0.4]]))
    assert torch.equal(result.x_adv[0], starts[0])  # to the bit, since it was inside
    assert result.forwards.tolist() == [3, 3, 5, 4, 1]  # a look at x, the start, two questions, the verdict
    assert counter.seen == 16
    assert [(s.name, s.forwards, s.solved) for s in result.stages] == [("clean", 5, 1), ("starts", 3, 2), ("attack", 8, 0)]
    assert result.solver.tolist() == [1, 1, -1, -1, 0]


def test_a_start_that_is_inside_is_asked_as_it_is_to_the_bit():
    """Projected, it would be moved by a rounding: x + (start - x) is another number."""
    x, starts = (
        torch.tensor([[0.9, 0.1]]).repeat(50, 1),
        torch.rand(50, 2, generator=torch.Generator().manual_seed(1)).sort(1)[0] ** 2,
    )
    assert not torch.equal(Linf(1.0).project(starts, x), starts)
    assert torch.equal(Lazy()(AXIS, x, torch.ones(50, dtype=torch.int64), threat=Linf(1.0), starts=starts).x_adv, starts)


def test_without_any_start_nothing_is_spent_on_them():
    for starts in (torch.full_like(POINTS, NAN), POINTS * torch.tensor([1.0, NAN])):  # half of a point is none
        result, plain = (Lazy()(AXIS, POINTS, ONES, threat=Linf(0.1), starts=s) for s in (starts, None))
        assert torch.equal(result.forwards, plain.forwards)
        assert [(s.name, s.forwards, s.solved) for s in result.stages][1] == ("starts", 0, 0)


@pytest.mark.parametrize("keep", ["first", "best", "smallest"])
@pytest.mark.parametrize("threat", [Linf(0.15), L2(0.5)], ids=repr)
def test_with_starts_it_is_never_worse_and_what_they_break_is_broken(keep, threat):
    """Starts of a longer attack, for some examples; batches of four, so that rows are distinguishable."""
    net, by = Target(NET, batch_size=4), PGD(steps=2, reach=0.5)
    given = torch.tensor([False, True, True, False, True, True])
    strong = PGD(steps=40, reach=8.0)(NET, X, Y, threat=threat)
    starts = strong.x_adv.clone()
    starts[~given] = NAN
    without, result = (attack(net=net, by=by, threat=threat, keep=keep, starts=s) for s in (None, starts))
    assert (result.success == (without.success | (strong.success & given))).all()
    assert result.success.sum() > without.success.sum()
    assert threat.contains(result.x_adv, X).all()
    if keep == "best":
        logits = (NET(r.x_adv) for r in (result, without))
        ours, theirs = (nn.functional.cross_entropy(out, Y, reduction="none") for out in logits)
        assert (ours >= theirs - 1e-6)[result.success == without.success].all()
    if keep == "smallest":
        assert (result.size <= without.size + 1e-9)[without.success].all()
    if keep != "first":  # everybody goes on, so the starts are what it costs more
        assert (result.forwards - without.forwards).tolist() == given.long().tolist()


def test_an_attack_by_starts_alone_follows_half_precision_and_float64():
    for dtype in (torch.float64, torch.bfloat16):
        starts = torch.tensor([[0.4, 0.5]] * 5)
        result = Lazy()(copy.deepcopy(AXIS).to(dtype), POINTS.to(dtype), ONES, threat=Linf(0.125), starts=starts)
        assert result.x_adv.dtype == dtype
        assert result.success.all()


def test_on_a_random_target_a_start_is_one_more_candidate_that_fresh_draws_judge():
    """Wrong on seven draws of ten beyond the axis: whatever one draw has said there, the rate is that of fresh draws."""

    def noisy(x):
        return AXIS(x) * torch.where(torch.rand(len(x), 1) < 0.7, 1.0, -1.0)

    x, starts = torch.tensor([[0.5, 0.4]] * 20), torch.tensor([[0.3, 0.6]] * 20)
    starts[10:] = NAN
    target, ones = Target(noisy, stochastic=True), torch.ones(20, dtype=torch.int64)
    result, plain = (Lazy(1)(target, x, ones, threat=Linf(0.21), starts=s) for s in (starts, None))
    assert not plain.success.any()
    began = (result.x_adv == starts).all(1)
    assert torch.equal(result.success, began)
    assert 5 <= began.sum() <= 10
    # The mean of at most 400 fresh draws; were it the draw of the stage, it would be 1.
    assert result.rate[began].mean().item() == pytest.approx(0.7, abs=0.12)
    # One question more; the verdict asks about the same candidates, on as many draws.
    assert (result.forwards - plain.forwards).tolist() == [1] * 10 + [0] * 10


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"starts": X[:5]}, ShapeError, r"starts are torch.float32 of shape \(5, 1, 4, 4\); .* shape of x, \(6, 1, 4, 4\)"),
        ({"starts": X[0]}, ShapeError, r"\(1, 4, 4\)"),
        ({"starts": (X * 255).byte()}, ShapeError, "torch.uint8"),
        ({"starts": X.tolist()}, ShapeError, "starts are list"),
        ({"starts": X, "keep": "last"}, ArgumentError, 'starts are of no use: .* keep="last"'),
        ({"starts": X, "by": UniversalPGD()}, ArgumentError, "no use: UniversalPGD.* adds one perturbation to every"),
    ],
)
def test_starts_that_do_not_fit_or_could_not_count_are_refused(change, error, words):
    with pytest.raises(error, match=words):
        attack(**change)
