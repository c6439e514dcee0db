"""Attacks and defences are converted between ART and this package, and tested with ART's tools and our laws."""

import copy
import functools
import sys
import warnings

import numpy as np
import pytest
import torch
from counting import Counting
from torch import nn

from robustkit import FGSM, L1, L2, PGD, ClassifyAs, Linf, Misclassify, Pixels, Target
from robustkit._engine.state_guard import random_state
from robustkit.attack import FLAT_GRADIENTS, Attack
from robustkit.defence import Defence
from robustkit.defences import Quantise
from robustkit.errors import ArgumentError, MissingExtraError, ShapeError
from robustkit.interop.art import from_art, preprocessor, to_art
from robustkit.interop.peers import load_art
from robustkit.losses import margin
from robustkit.testing import check_attack
from robustkit.testing._check_law import check_law
from robustkit.testing.attack_laws import LAWS, _cases

load_art()
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy's, about what ART does to tensors

from art.attacks.attack import EvasionAttack  # noqa: E402
from art.attacks.evasion import (  # noqa: E402
    AutoAttack,
    AutoProjectedGradientDescent,
    BoundaryAttack,
    CarliniL2Method,
    DeepFool,
    ElasticNet,
    FastGradientMethod,
    HopSkipJump,
    PixelAttack,
    ProjectedGradientDescent,
    SaliencyMapMethod,
    SimBA,
    SquareAttack,
)
from art.defences.postprocessor import Rounded  # noqa: E402
from art.defences.preprocessor.preprocessor import Preprocessor, PreprocessorPyTorch  # noqa: E402
from art.defences.trainer import AdversarialTrainer, AdversarialTrainerTRADESPyTorch  # noqa: E402
from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing  # noqa: E402
from art.estimators.classification import BlackBoxClassifier, PyTorchClassifier  # noqa: E402

EPS = 0.3


def classifier_of(net, *, clip_values=(0.0, 1.0), kind=PyTorchClassifier, **keywords):
    return kind(
        model=net,
        loss=nn.CrossEntropyLoss(),
        input_shape=(1, 8, 8),
        nb_classes=10,
        clip_values=clip_values,
        device_type="cpu",
        **keywords,
    )


def correct_only(classifier, x, y):
    """Return the correctly classified images and their labels, as arrays."""
    right = classifier.predict(x.numpy()).argmax(1) == y.numpy()
    return x.numpy()[right], y.numpy()[right]


def fooled(classifier, x_adv, y):
    return (classifier.predict(x_adv).argmax(1) != y).mean()


class Rounding(PreprocessorPyTorch):
    """Rounding with the identity as its gradient, written as ART documents it."""

    def __init__(self):
        super().__init__(device_type="cpu", is_fitted=True, apply_fit=False, apply_predict=True)

    def forward(self, x, y=None):
        return (x * 7).round() / 7, y

    def estimate_forward(self, x, y=None):
        return x


class Smoothing(PreprocessorPyTorch):
    """Average pooling, which torch differentiates."""

    def __init__(self):
        super().__init__(device_type="cpu", is_fitted=True, apply_fit=False, apply_predict=True)

    def forward(self, x, y=None):
        return nn.functional.avg_pool2d(x, 3, 1, 1), y


class NumpyRounding(Preprocessor):
    """Rounding in numpy; ART's gradient for it is the identity."""

    def __init__(self):
        super().__init__(is_fitted=True, apply_fit=False, apply_predict=True)

    def __call__(self, x, y=None):
        return (np.round(x * 7) / 7).astype(np.float32), y


class Whole(nn.Module):
    """A model in one module: ART splits an `nn.Sequential`, and its TRADES then uses the first layer."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


class Shift(Attack):
    """A universal perturbation: the sign of the mean gradient."""

    universal = True

    def __init__(self, direction=None):
        self.direction = direction

    def fitted(self, problem):
        grads = [part.loss_and_grad(part.x)[1] for part in problem.batches(problem.batch_size)]
        return Shift(-torch.cat(grads).mean(0, keepdim=True).sign())

    def run(self, problem):
        return problem.threat.project(problem.x + self.direction * problem.threat.eps, problem.x)


class Guess(Attack):
    """Tries random points; uses no gradients."""

    access = "score"

    def run(self, problem):
        for draw in problem.steps(30):
            x_adv = problem.start(draw)
            problem.loss(x_adv)
        return x_adv


# a defence that looks robust in ART


@pytest.mark.slow
def test_rounding_looks_robust_in_art_but_is_not(trained):
    net, x, y = trained
    documented, ours = (classifier_of(net, preprocessing_defences=[step]) for step in (Rounding(), preprocessor(Quantise(8))))
    x, y = correct_only(documented, x, y)
    assert np.array_equal(documented.predict(x), ours.predict(x))  # both are the same defence
    pgd = functools.partial(ProjectedGradientDescent, eps=EPS, eps_step=EPS / 10, max_iter=40, verbose=False)
    assert fooled(documented, pgd(documented).generate(x, y), y) == 0  # ART, with a preprocessor as ART documents it
    assert fooled(ours, pgd(ours).generate(x, y), y) >= 0.95  # ART, with our defence
    for classifier in (documented, ours, classifier_of(net, preprocessing_defences=[NumpyRounding()])):
        assert fooled(classifier, to_art(PGD(), classifier, threat=Linf(EPS)).generate(x, y), y) >= 0.95
    images, labels, guarded = torch.from_numpy(x), torch.from_numpy(y), Quantise(8).guard(net)
    with_bpda, with_exact = (
        from_art(pgd)(guarded.with_view(view), images, labels, threat=Linf(EPS)) for view in ("bpda", "exact")
    )
    assert with_bpda.success.float().mean() >= 0.95
    assert torch.equal(with_bpda.success, net(Quantise(8)(with_bpda.x_adv)).argmax(1) != labels)
    assert not with_exact.success.any()


# our attacks in ART


@pytest.mark.parametrize("attack", [FGSM(), PGD(steps=5)], ids=repr)
@pytest.mark.parametrize("threat", [Linf(0.1), L2(1.0), L1(3.0), Pixels(3)], ids=lambda t: type(t).__name__)
def test_art_returns_what_the_attack_returns(trained, attack, threat):
    net, x, y = trained
    adapter = to_art(attack, classifier_of(net), threat=threat, seed=3)
    direct = attack(net, x, y, threat=threat, seed=3).x_adv.numpy()
    one_hot = np.eye(10, dtype=np.float32)[y]
    for given in (y.numpy(), y.numpy()[:, None], one_hot, y, y.numpy().astype(np.int32)):
        found = adapter.generate(x.numpy(), given)
        assert isinstance(found, np.ndarray)
        assert found.dtype == np.float32
        assert np.array_equal(found, direct)
    assert isinstance(adapter, EvasionAttack)
    assert np.array_equal(adapter.generate(x=x.numpy().astype(np.float64), y=one_hot), direct)


def test_without_labels_the_predictions_are_used(trained):
    net, x, y = trained
    adapter, predicted = to_art(PGD(steps=5), classifier_of(net), threat=Linf(0.1)), net(x).argmax(1)
    assert np.array_equal(adapter.generate(x.numpy()), adapter.generate(x.numpy(), predicted.numpy()))
    assert not torch.equal(predicted, y)


def test_predictions_are_those_of_evaluation_mode(trained):
    net, x, _ = trained
    dropping = nn.Sequential(net, nn.Dropout(0.9))
    adapter = to_art(PGD(steps=5), classifier_of(dropping), threat=Linf(0.1))
    dropping.train()
    assert np.array_equal(adapter.generate(x.numpy()), adapter.generate(x.numpy(), net(x).argmax(1)))


def test_targeted_is_the_goal_classify_as(trained):
    net, x, y = trained
    target_class, adapter = (y + 1) % 10, to_art(PGD(steps=5), classifier_of(net), threat=Linf(0.2), goal=ClassifyAs(margin))
    direct = PGD(steps=5)(net, x, target_class, goal=ClassifyAs(margin), threat=Linf(0.2)).x_adv
    assert adapter.targeted is True
    assert np.array_equal(adapter.generate(x.numpy(), target_class.numpy()), direct.numpy())
    with pytest.raises(ArgumentError, match="target classes"):
        adapter.generate(x.numpy())
    adapter.set_params(targeted=False)
    assert adapter.goal == Misclassify(margin)
    adapter.set_params(targeted=True)
    assert adapter.goal == ClassifyAs(margin)


def test_set_params_sets_all_or_nothing(trained):
    net, x, y = trained
    adapter = to_art(PGD(steps=5), classifier_of(net), threat=Linf(0.1))
    adapter.set_params(eps=0.2, seed=4, keep="last", batch_size=50, verbose=True, attack=PGD(steps=3))
    direct = PGD(steps=3)(Target(net, batch_size=50), x, y, threat=Linf(0.2), seed=4, keep="last").x_adv
    assert np.array_equal(adapter.generate(x.numpy(), y.numpy()), direct.numpy())
    assert "eps=0.2" in repr(adapter)
    for name, value in (
        ("eps", -1),
        ("eps", "large"),
        ("targeted", 1),
        ("batch_size", 0),
        ("batch_size", True),
        ("seed", 0.5),
        ("keep", "worst"),
        ("verbose", None),
        ("attack", PGD),
        ("threat", 0.1),
        ("goal", "wrong"),
    ):
        with pytest.raises(ArgumentError):
            adapter.set_params(**{"eps": 0.3, name: value})
        assert (adapter.eps, adapter.batch_size, adapter.seed, adapter.keep) == (0.2, 50, 4, "last")
    with pytest.raises(ValueError, match="cannot be set"):
        adapter.set_params(steps=7)
    adapter.set_params(eps=np.full(len(x), 0.1, dtype=np.float32))
    assert Linf(0.1).contains(torch.from_numpy(adapter.generate(x.numpy(), y.numpy())), x).all()


def test_the_bounds_are_those_of_the_estimator(trained):
    net, x, y = trained

    class Divide(nn.Module):
        def forward(self, z):
            return net(z / 255)

    threat = Linf(8.0, bounds=(0, 255))
    adapter = to_art(PGD(steps=5), classifier_of(Divide(), clip_values=(0, 255)), threat=Linf(0.5))
    adapter.set_params(eps=8.0)
    direct = PGD(steps=5)(Divide(), x * 255, y, threat=threat).x_adv
    assert np.array_equal(adapter.generate(x.numpy() * 255, y), direct.numpy())
    free = to_art(PGD(steps=5), classifier_of(net, clip_values=None), threat=Linf(0.1, bounds=(-9, 9)))
    assert free.generate(x.numpy(), y).min() < 0
    each = np.zeros((1, 8, 8)), np.linspace(1, 2, 64).reshape(1, 8, 8)
    with pytest.raises(ArgumentError, match="clip_values"):
        to_art(FGSM(), classifier_of(net, clip_values=each), threat=Linf(0.1))
    same = to_art(FGSM(), classifier_of(net, clip_values=(np.zeros((1, 8, 8)), np.ones((1, 8, 8)))), threat=Linf(0.1))
    assert same.generate(x.numpy(), y).max() <= 1


def test_gradients_go_through_the_preprocessing(trained):
    net, x, y = trained
    classifier = classifier_of(net, preprocessing_defences=[Smoothing()], preprocessing=(0.3, 0.7))

    def whole(z):
        return net((nn.functional.avg_pool2d(z, 3, 1, 1) - 0.3) / 0.7)

    assert torch.allclose(torch.from_numpy(classifier.predict(x.numpy())), whole(x), atol=1e-5)
    found = to_art(PGD(steps=5), classifier, threat=Linf(0.1), keep="last").generate(x.numpy(), y)
    direct = PGD(steps=5)(whole, x, y, threat=Linf(0.1), keep="last").x_adv.numpy()
    assert (np.abs(found - direct) < 1e-6).mean() > 0.99  # paths may differ where the gradient is not continuous


def test_numpy_preprocessing_uses_arts_estimated_gradient(trained):
    net, x, y = trained
    classifier = classifier_of(net, preprocessing_defences=[NumpyRounding()], preprocessing=(0.1, 0.9))
    x, y = correct_only(classifier, x, y)
    assert fooled(classifier, to_art(PGD(), classifier, threat=Linf(EPS)).generate(x, y), y) >= 0.95
    found = to_art(Guess(), classifier, threat=Linf(EPS)).generate(x, y)
    assert fooled(classifier, found, y) > 0.1


@pytest.mark.slow
def test_success_is_judged_on_what_the_estimator_predicts(trained):
    net, x, y = trained
    filtered = classifier_of(net, postprocessing_defences=[Rounded(decimals=1, apply_predict=True)])
    images, labels = correct_only(filtered, x, y)
    found = to_art(PGD(), filtered, threat=Linf(EPS)).generate(images, labels)
    assert fooled(filtered, found, labels) >= 0.95

    def rounded(z):
        return (net(z) * 10).round() / 10

    target = Target(rounded, views={"model": net})
    direct = PGD()(target, torch.from_numpy(images), torch.from_numpy(labels), threat=Linf(EPS))
    assert np.array_equal(found, direct.x_adv.numpy())
    smoothed = classifier_of(net, kind=PyTorchRandomizedSmoothing, sample_size=16, scale=0.1, alpha=0.01)
    found = to_art(PGD(steps=5), smoothed, threat=Linf(EPS), batch_size=8).generate(x.numpy()[:8], y[:8])
    assert (smoothed.predict(found, verbose=False).argmax(1) != y[:8].numpy()).mean() > 0.5


def test_attacks_on_outputs_work_with_any_classifier(trained):
    net, x, y = trained
    box = BlackBoxClassifier(lambda z: net(torch.from_numpy(z)).detach().numpy(), (1, 8, 8), 10, clip_values=(0, 1))
    found = to_art(Guess(), box, threat=Linf(0.3)).generate(x.numpy(), y)
    direct = Guess()(net, x, y, threat=Linf(0.3)).x_adv
    assert np.array_equal(found, direct.numpy())
    with pytest.raises(ArgumentError, match="must be an ART classifier"):  # ART's own requirement
        to_art(PGD(), box, threat=Linf(0.3))


def test_channels_last_is_supported(trained):
    net, x, y = trained
    torch.manual_seed(0)
    colour = nn.Sequential(nn.Conv2d(3, 1, 1), net).eval()
    x = torch.rand(20, 3, 8, 8)
    y = colour(x).argmax(1)

    class Last(nn.Module):
        def forward(self, z):
            return colour(z.movedim(-1, 1))

    classifier = PyTorchClassifier(
        Last(),
        loss=nn.CrossEntropyLoss(),
        input_shape=(8, 8, 3),
        nb_classes=10,
        clip_values=(0, 1),
        channels_first=False,
        device_type="cpu",
    )
    found = to_art(PGD(), classifier, threat=Pixels(3)).generate(x.movedim(1, -1).numpy(), y)
    direct = PGD()(colour, x, y, threat=Pixels(3)).x_adv
    assert found.shape == (20, 8, 8, 3)
    assert np.array_equal(found, direct.movedim(1, -1).numpy())
    assert ((found != x.movedim(1, -1).numpy()).any(-1).sum((1, 2)) <= 3).all()


def test_universal_attacks(trained):
    net, x, y = trained
    found = to_art(Shift(), classifier_of(net), threat=Linf(0.1)).generate(x.numpy(), y)
    direct = Shift()(net, x, y, threat=Linf(0.1)).x_adv
    assert np.array_equal(found, direct.numpy())
    inner = (x > 0.1) & (x < 0.9)
    assert (((found - x.numpy())[inner.numpy()]).round(4).__abs__() == np.float32(0.1)).all()


def test_a_mask_with_zeros_is_refused(trained):
    net, x, y = trained
    adapter = to_art(FGSM(), classifier_of(net), threat=Linf(0.1))
    assert np.array_equal(adapter.generate(x.numpy(), y, mask=np.ones((8, 8))), adapter.generate(x.numpy(), y))
    with pytest.raises(ArgumentError, match="mask"):
        adapter.generate(x.numpy(), y, mask=np.tri(8))


def test_the_estimator_is_restored(trained):
    net, x, y = trained
    net = copy.deepcopy(net).train()
    net[0].eval()
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    classifier = classifier_of(net)
    net.train()
    net[0].eval()
    before, state = copy.deepcopy(net.state_dict()), random_state()
    for labels in (y.numpy(), None):
        to_art(PGD(steps=3), classifier, threat=Linf(0.1)).generate(x.numpy(), labels)
        assert [part.training for part in net] == [False] + [True] * 6
        assert all((p.grad == 0.5).all() and p.requires_grad for p in net.parameters())
        assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
        assert random_state() == state


@pytest.mark.slow
def test_arts_trainers_accept_our_attacks(trained):
    net, x, y = trained
    one_hot = np.eye(10, dtype=np.float32)[y]

    def new_classifier():
        twin = Whole(copy.deepcopy(net))
        return classifier_of(twin, optimizer=torch.optim.Adam(twin.parameters(), 5e-3))

    def robust(classifier):
        held = to_art(PGD(), classifier, threat=Linf(0.15)).generate(x.numpy(), y)
        return 1 - fooled(classifier, held, y.numpy())

    classifier = new_classifier()
    start = robust(classifier)
    adapter = to_art(PGD(steps=5), classifier, threat=Linf(0.15))
    AdversarialTrainer(classifier, adapter, ratio=1.0).fit(x.numpy(), one_hot, batch_size=32, nb_epochs=15)
    assert robust(classifier) > start + 0.3
    classifier = new_classifier()
    trades = AdversarialTrainerTRADESPyTorch(classifier, to_art(PGD(steps=5), classifier, threat=Linf(0.15)), beta=6.0)
    trades.fit(x.numpy(), one_hot, batch_size=32, nb_epochs=15)
    assert robust(classifier) > start + 0.3


def test_arts_autoattack_runs_our_attacks(trained, monkeypatch):
    net, x, y = trained
    monkeypatch.setitem(sys.modules, "multiprocess", sys)  # ART imports it, but does not use it without a pool
    classifier = classifier_of(net)
    attacks = [to_art(FGSM(), classifier, threat=Linf(0.1)), to_art(PGD(), classifier, threat=Linf(0.1))]
    found = AutoAttack(classifier, eps=0.1, attacks=attacks, targeted=True).generate(x.numpy(), y.numpy())
    alone = attacks[1]
    alone.set_params(targeted=False)
    assert fooled(classifier, found, y.numpy()) >= fooled(classifier, alone.generate(x.numpy(), y), y.numpy())


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"attack": PGD}, "must be (a )?robustkit (attack|objects)"),
        ({"threat": 0.1}, "must be (a )?robustkit (attack|objects)"),
        ({"goal": "wrong"}, "goal"),
        ({"keep": "worst"}, "keep"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": "x"}, "seed"),
        ({"estimator": nn.Linear(1, 1)}, "must be an ART classifier"),
    ],
)
def test_invalid_arguments_are_refused_at_once(trained, arguments, why):
    given = {"attack": PGD(), "estimator": classifier_of(trained[0]), "threat": Linf(0.1), **arguments}
    with pytest.raises(ArgumentError, match=why):
        to_art(given.pop("attack"), given.pop("estimator"), **given)


@pytest.mark.parametrize("y", [np.zeros(3), np.zeros((128, 2, 2)), np.zeros((3, 10))])
def test_labels_of_other_shapes_are_refused(trained, y):
    with pytest.raises(ShapeError, match="y has shape"):
        to_art(FGSM(), classifier_of(trained[0]), threat=Linf(0.1)).generate(trained[1].numpy(), y)


# attacks of ART in robustkit

WRAPPED = {
    "fgm": (FastGradientMethod, Linf(0.1), Misclassify()),
    "minimal": (lambda c: FastGradientMethod(c, minimal=True, eps=0.3, eps_step=0.1), Linf(0.2), Misclassify()),
    "pgd": (lambda c: ProjectedGradientDescent(c, max_iter=5, num_random_init=2), Linf(0.1), ClassifyAs()),
    "pgd-l2": (lambda c: ProjectedGradientDescent(c, norm=2, max_iter=5), L2(1.0), Misclassify()),
    "apgd": (lambda c: AutoProjectedGradientDescent(c, max_iter=5, nb_random_init=1), Linf(0.1), Misclassify()),
    "deepfool": (lambda c: DeepFool(c, max_iter=10), L2(2.0), Misclassify()),
    "carlini": (lambda c: CarliniL2Method(c, max_iter=3, binary_search_steps=2), L2(1.0), Misclassify()),
    "ead": (lambda c: ElasticNet(c, max_iter=5, binary_search_steps=2), L1(5.0), ClassifyAs()),
    "square": (lambda c: SquareAttack(c, max_iter=20), Linf(0.3), Misclassify()),
    "jsma": (SaliencyMapMethod, Pixels(20), Misclassify()),
    "hsj": (lambda c: HopSkipJump(c, max_iter=1, max_eval=60, init_eval=40), L2(3.0), Misclassify()),
    "boundary": (lambda c: BoundaryAttack(c, max_iter=2, targeted=False), L2(3.0), Misclassify()),
    "pixel": (lambda c: PixelAttack(c, th=40, es=1, max_iter=1), Pixels(2), Misclassify()),
}


def ref_of(goal, y):
    return (y + 1) % 10 if isinstance(goal, ClassifyAs) else y


@pytest.mark.slow
@pytest.mark.parametrize("name", WRAPPED)
def test_queries_are_counted_and_success_matches_the_model(trained, name):
    (make, threat, goal), (net, x, y) = WRAPPED[name], trained
    x, ref, counting = x[:10], ref_of(goal, y[:10]), Counting(net).eval()
    result = from_art(make)(Target(counting, batch_size=6), x, ref, goal=goal, threat=threat)
    assert int(result.forwards.sum()) == counting.forwards
    assert int(result.backwards.sum()) == counting.backwards
    assert (result.forwards > 0).all()
    assert torch.equal(result.success, goal.success(net(result.x_adv), ref))
    assert threat.contains(result.x_adv, x).all()
    assert result.success.any() or name in ("carlini", "ead", "jsma", "pixel", "pgd")


def test_attacks_on_single_images_get_one_at_a_time(trained):
    net, x, y = trained
    counting = Counting(nn.Sequential(net, nn.Softmax(1))).eval()  # it needs probabilities
    result = from_art(lambda c: SimBA(c, max_iter=200, epsilon=0.3))(counting, x[:6], y[:6], threat=L2(3.0))
    assert result.success.any()
    assert int(result.forwards.sum()) == counting.forwards


@pytest.mark.parametrize("name", ["fgm", "pgd", "deepfool", "square", "jsma"])
def test_model_and_random_state_are_restored(trained, name):
    (make, threat, goal), (net, x, y) = WRAPPED[name], trained
    net = copy.deepcopy(net).train()
    net[0].eval()
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    before, state = copy.deepcopy(net.state_dict()), random_state()
    for target in (net, lambda z: net(z)):
        from_art(make)(target, x[:6], ref_of(goal, y[:6]), goal=goal, threat=threat)
        assert all((p.grad == 0.5).all() and p.requires_grad for p in net.parameters())
        assert [part.training for part in net] == [False] + [True] * 6
        assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
        assert random_state() == state


@pytest.mark.parametrize(("norm", "threat", "eps"), [(np.inf, Linf, 0.1), ("inf", Linf, 0.05), (2, L2, 0.5), (1, L1, 2.0)])
def test_results_equal_those_of_art(trained, norm, threat, eps):
    net, x, y = trained
    classifier = PyTorchClassifier(
        net,
        loss=nn.CrossEntropyLoss(reduction="sum"),
        input_shape=(1, 8, 8),
        nb_classes=10,
        clip_values=(0, 1),
        device_type="cpu",
    )
    make = functools.partial(ProjectedGradientDescent, norm=norm, max_iter=10, verbose=False)
    theirs = make(classifier, eps=eps, eps_step=eps / 3, batch_size=128).generate(x.numpy(), y.numpy())
    ours = from_art(functools.partial(make, eps=0.3, eps_step=0.1))(net, x, y, threat=threat(eps), keep="last")
    inside = threat(eps).contains(torch.from_numpy(theirs), x)
    assert inside.float().mean() > 0.9
    assert torch.allclose(ours.x_adv[inside], torch.from_numpy(theirs)[inside], atol=1e-6)  # eps_step is scaled with eps


def test_each_example_has_its_own_eps(trained):
    net, x, y = trained
    eps = torch.tensor([0.02, 0.1, 0.3]).repeat(len(x) // 3 + 1)[: len(x)]
    result = from_art(FastGradientMethod)(net, x, y, threat=Linf(eps), keep="last")
    for value in (0.02, 0.1, 0.3):
        at = (eps == value).nonzero().squeeze(1)
        direct = from_art(FastGradientMethod)(net, x[at], y[at], threat=Linf(eps[at][0].item()), keep="last")
        assert torch.equal(result.x_adv[at], direct.x_adv)
        assert (result.size[at] > 0.9 * value).all()


def test_converting_to_art_and_back_gives_the_same_attack(trained):
    net, x, y = trained
    round_trip = from_art(lambda classifier: to_art(PGD(steps=5), classifier, threat=Linf(1.0), keep="last"))
    direct = PGD(steps=5)(net, x, y, threat=Linf(0.1), keep="last")
    wrapped = round_trip(net, x, y, threat=Linf(0.1), keep="last")  # eps is that of the problem
    assert torch.equal(wrapped.x_adv, direct.x_adv)
    with pytest.raises(ArgumentError, match="does not match"):
        round_trip(net, x, y, threat=L2(0.1))


def test_large_batches_are_split_to_arts_batch_size(trained):
    net, x, y = trained
    many, labels = x.repeat(2, 1, 1, 1)[:200], y.repeat(2)[:200]
    sizes = []

    def spy(z):
        sizes.append(len(z))
        return net(z)

    from_art(lambda c: ProjectedGradientDescent(c, max_iter=2))(
        Target(spy, net, batch_size=256), many, labels, threat=Linf(0.1), keep="last"
    )
    assert set(sizes) == {1, 128, 72, 200}  # counting classes, two batches, the final check


def test_attacks_on_one_image_query_in_batches_of_the_target(trained):
    net, x, y = trained
    sizes = []

    def spy(z):
        sizes.append(len(z))
        return net(z)

    make = WRAPPED["hsj"][0]
    result = from_art(make)(Target(spy, net, batch_size=16), x[:3], y[:3], threat=L2(3.0))
    assert max(sizes) == 16
    assert int(result.forwards.sum()) == sum(sizes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "serves"),
    [
        (FastGradientMethod, [Linf]),
        (lambda c: FastGradientMethod(c, norm=2), [L2]),
        (lambda c: ProjectedGradientDescent(c, max_iter=4, eps=0.4), [Linf]),
        (lambda c: ProjectedGradientDescent(c, max_iter=4, norm=2), [L2]),
    ],
    ids=["fgm", "fgm-l2", "pgd", "pgd-l2"],
)
def test_the_laws_hold(make, serves, cases):
    cases(check_attack(from_art(make), serves=serves, examples=8))


@pytest.mark.slow
def test_all_laws_hold_one_by_one_with_random_starts(cases):
    make = functools.partial(ProjectedGradientDescent, max_iter=3, num_random_init=1)
    cases(check_attack(from_art(make, one_by_one=True), serves=[Linf], examples=6))
    laws = [
        law for law in LAWS if law.__name__ != "result_does_not_depend_on_the_batch"
    ]  # in a batch, noise belongs to the batch
    cases(sum(check_law(law, from_art(make), _cases([Linf]), 6) for law in laws))


@pytest.mark.parametrize("name", ["square", "hsj", "boundary"])
def test_examples_attacked_alone_do_not_depend_on_the_batch(trained, name):
    (make, threat, goal), (net, x, y) = WRAPPED[name], trained

    def images(rows, size):
        target, ids = Target(net, batch_size=size), torch.arange(9)[rows]
        return from_art(make)(target, x[:9][rows], y[:9][rows], goal=goal, threat=threat, ids=ids, keep="last").x_adv

    reversed_rows = torch.arange(9).flip(0)
    assert torch.allclose(images(reversed_rows, 4).flip(0), images(slice(None), 9), atol=1e-6)
    assert torch.allclose(images(slice(5, 6), 9), images(slice(None), 9)[5:6], atol=1e-6)


def test_results_depend_only_on_the_seed(trained):
    net, x, y = trained
    attack = from_art(WRAPPED["pgd"][0])

    def bytes_of(seed):
        torch.rand(7)
        np.random.rand(3)
        warnings.simplefilter("error")  # ART's own warnings do not reach the caller
        return attack(net, x[:20], y[:20], threat=Linf(0.1), seed=seed, keep="last").x_adv

    assert torch.equal(bytes_of(0), bytes_of(0))
    assert not torch.equal(bytes_of(0), bytes_of(1))


def test_a_model_without_a_graph_raises_the_flag(trained):
    net, x, y = trained
    result = from_art(FastGradientMethod)(lambda z: net(z).detach(), x, y, threat=Linf(0.1))
    assert [flag.name for flag in result.flags] == [FLAT_GRADIENTS]


class ReturnsNan(FastGradientMethod):
    """Returns NaN, or another shape."""

    shape = slice(None)

    def generate(self, x, y=None, **kwargs):
        return np.full_like(x, np.nan)[self.shape]


class ReturnsOtherShape(ReturnsNan):
    shape = slice(1)


def test_nan_and_other_shapes_are_no_successes(trained):
    net, x, y = trained
    result = from_art(ReturnsNan)(net, x, y, threat=Linf(0.1), keep="last")
    assert torch.equal(result.x_adv, x)
    with pytest.raises(ShapeError, match="returned"):
        from_art(ReturnsOtherShape)(net, x, y, threat=Linf(0.1), keep="last")


class AlwaysTargeted(FastGradientMethod):
    """An attack without the parameter `targeted`: it may use labels as target classes."""

    attack_params = EvasionAttack.attack_params
    received = ()

    def generate(self, x, y=None, **kwargs):
        type(self).received = (*self.received, y)
        return x


def test_attacks_without_a_targeted_parameter_get_no_labels(trained, monkeypatch):
    net, x, y = trained
    monkeypatch.setattr(AlwaysTargeted, "received", ())
    from_art(AlwaysTargeted)(net, x, y, threat=Linf(0.1), keep="last")
    from_art(lambda c: AlwaysTargeted(c, targeted=True))(net, x, y, goal=ClassifyAs(), threat=Linf(0.1), keep="last")
    assert AlwaysTargeted.received[0] is None
    assert np.array_equal(AlwaysTargeted.received[1], np.eye(10)[y])
    with pytest.raises(ArgumentError, match="is not supported"):
        from_art(lambda c: AlwaysTargeted(c, targeted=True))(net, x, y, threat=Linf(0.1), keep="last")


def test_the_number_of_pixels_is_the_eps_of_the_threat(trained, monkeypatch):
    net, x, y = trained
    allowed = []
    monkeypatch.setattr(PixelAttack, "generate", lambda self, x, y=None: allowed.append(self.th) or x)
    from_art(WRAPPED["pixel"][0])(net, x[:4], y[:4], threat=Pixels(torch.tensor([2.0, 3.0, 3.0, 2.0])), keep="last")
    assert allowed == [2, 3]


def test_pixels_that_differ_only_by_arts_rounding_are_restored(trained):
    net, x, y = trained
    result = from_art(WRAPPED["pixel"][0])(net, x[:6], y[:6], threat=Pixels(1), keep="last")
    assert ((result.x_adv != x[:6]).flatten(1).sum(1) <= 1).all()


@pytest.mark.parametrize(
    ("make", "threat", "goal", "why"),
    [
        (FastGradientMethod, L2(0.5), Misclassify(), "does not match"),
        (lambda c: FastGradientMethod(c, norm=2), Pixels(2), Misclassify(), "does not match"),
        (DeepFool, L2(0.5), ClassifyAs(), "is not supported"),
        (lambda c: c, L2(0.5), Misclassify(), "must return an instance"),
    ],
)
def test_unsupported_threats_and_goals_are_refused(trained, make, threat, goal, why):
    net, x, y = trained
    with pytest.raises(ArgumentError, match=why):
        from_art(make)(net, x, y, goal=goal, threat=threat)


def test_an_attack_instance_is_refused(trained):
    with pytest.raises(ArgumentError, match="must be a function"):
        from_art(FastGradientMethod(classifier_of(trained[0])))


def test_the_recipe_is_readable():
    assert repr(from_art(FastGradientMethod)) == "ArtAttack(make=FastGradientMethod, one_by_one=False)"


# our defences in ART


class Blur(Defence):
    """A learned average with dropout, whose first view has a different value."""

    def __init__(self):
        super().__init__()
        self.conv, self.drop = nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.Dropout(0.5)
        nn.init.constant_(self.conv.weight, 1 / 9)

    def forward(self, x, noise=None):
        return self.drop(self.conv(x))

    def views(self):
        return {"scaled": lambda x: 3 * self.conv(x), "exact": self.forward}


def test_a_preprocessor_has_the_value_of_the_defence_and_the_gradient_of_its_first_view(trained):
    _, x, y = trained
    blur = Blur().train()
    step, weight = preprocessor(blur), torch.randn_like(x)
    exact, labels = step(x.numpy(), y.numpy())
    assert np.array_equal(exact, blur.conv(x).detach().numpy())  # without the dropout
    assert np.array_equal(labels, y.numpy())
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad((weight * 3 * blur.conv(leaf)).sum(), leaf)
    (step.forward(leaf)[0] * weight).sum().backward()
    assert torch.allclose(leaf.grad, expected, atol=1e-6)
    assert np.allclose(step.estimate_gradient(x.numpy(), weight.numpy()), expected.numpy(), atol=1e-6)
    assert blur.conv.weight.grad is None
    assert blur.drop.training
    assert blur.conv.weight.requires_grad
    assert isinstance(step, PreprocessorPyTorch)


def test_arts_gradient_is_that_of_the_view(trained):
    net, x, y = trained
    classifier = classifier_of(net, preprocessing_defences=[preprocessor(Quantise(8))])
    grad = classifier.loss_gradient(x.numpy(), np.eye(10, dtype=np.float32)[y])
    rounded = Quantise(8)(x).requires_grad_()
    (expected,) = torch.autograd.grad(nn.functional.cross_entropy(net(rounded), y), rounded)
    assert np.allclose(grad, expected.numpy(), atol=1e-7)
    assert np.abs(grad).max() > 0


@pytest.mark.parametrize("apply_fit", [True, False])
def test_a_preprocessor_is_applied_in_training_if_asked(apply_fit):
    step = preprocessor(Quantise(8), apply_fit=apply_fit)
    assert (step.apply_fit, step.apply_predict, step.is_fitted) == (apply_fit, True, True)


def test_a_preprocessor_needs_a_defence():
    with pytest.raises(ArgumentError, match="must be a Defence"):
        preprocessor(nn.Identity())
    step = preprocessor(Quantise(8))
    step.set_params(defence=Quantise(2))
    assert set(np.unique(step(np.random.rand(1, 1, 8, 8).astype(np.float32))[0])) == {0, 1}


# the import


@pytest.mark.parametrize(
    "call",
    [
        lambda: to_art(PGD(), None, threat=Linf(0.1)),
        lambda: from_art(None),
        lambda: preprocessor(Quantise(8)),
    ],
)
def test_missing_art_raises_with_the_install_command(monkeypatch, call):
    monkeypatch.setitem(sys.modules, "art.attacks.evasion", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'robustkit\[art\]'"):
        call()
