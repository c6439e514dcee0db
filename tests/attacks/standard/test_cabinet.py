"""Each mask of the cabinet hides what it says it hides, and what stands behind it falls."""

import pytest
import torch
from cabinet import ENTRIES, FEW, FIGURES, LEFT, NAIVE, STANDARD, right, standard, transfer
from torch.nn.functional import cosine_similarity, cross_entropy

from robustkit import Misclassify
from robustkit._engine.state_guard import fork_rng
from robustkit.losses import margin

BY_NAME = {entry.name: entry for entry in ENTRIES}
RANDOM = [entry.name for entry in ENTRIES if entry.draws > 1]
OPEN = ["nan-output"]  # where nothing is hidden
MISSED = {"rippled": 2, "noisy": 1, "resized": 3, "dropout": 3}  # by how many images of a hundred `Standard` is above the mark
SPARE = 4  # images: another processor rounds differently


def slope(fn, x, y):
    """The derivative of the cross-entropy; zeros where there is no way to it."""
    x = x.clone().requires_grad_()
    with fork_rng(0):
        loss = cross_entropy(fn(x), y, reduction="sum")
    found = torch.autograd.grad(loss, x, allow_unused=True)[0] if loss.requires_grad else None
    return torch.zeros_like(x) if found is None else found


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_it_looks_robust_and_is_not(entry):
    told, (x, y) = entry.figures, entry.images()
    naive = int((~NAIVE(entry.target, x, y, threat=entry.threat).success).sum())
    blind = transfer(entry)
    assert abs(right(entry, x) - told.clean) <= SPARE
    assert abs(naive - told.naive) <= 2 * SPARE
    assert blind <= told.transfer + SPARE * (1 + (entry.draws > 1))
    assert told.mark <= min(told.naive, told.transfer)
    assert told.clean >= 85
    if entry.name not in OPEN:
        assert naive >= told.mark + 10  # what the mask is worth to who believes it
        assert blind < naive or entry.name == "winners"  # who are no mask but another net


@pytest.mark.parametrize("name", LEFT)
def test_the_standard_evaluation_sees_through_it_and_says_so(name):
    """Of a few images, for the sake of time."""
    left, raised = standard(BY_NAME[name], FEW)
    assert abs(left - LEFT[name]) <= 2
    assert raised >= set(STANDARD[name][1]) - {"transfer-breaks"}  # where little is left for it


def test_of_a_hundred_images_it_comes_to_the_mark():
    """As it was measured; where it is above, the number carries a flag, and the docs say by how much it is too high."""
    above = {name: whole - FIGURES[name].mark for name, (whole, _) in STANDARD.items()}
    assert {name: by for name, by in above.items() if by} == MISSED
    assert all(flags for _, flags in STANDARD.values())


@pytest.mark.parametrize("name", ["rounded", "detached", "one-hot", "sign"])
def test_a_derivative_that_is_zero_everywhere(name):
    entry = BY_NAME[name]
    x, y = entry.images()
    assert not slope(entry.target.fn, x, y).any()
    assert slope(entry.unmasked(), x, y).flatten(1).any(1).all()


@pytest.mark.parametrize("name", ["stairs", "scaled", "hot", "probabilities"])
def test_a_derivative_that_is_zero_in_float32(name):
    """Of the cross-entropy, at most images, or at most pixels of each; that of the logits in front of the mask is not."""
    entry = BY_NAME[name]
    x, y = entry.images()
    assert (slope(entry.target.fn, x, y) == 0).double().mean() >= 0.85
    assert (slope(entry.unmasked(), x, y) == 0).double().mean() <= 0.01


def test_margins_see_through_large_logits_but_not_through_probabilities():
    left = {}  # after the naive attack, but for its loss
    for name in ("scaled", "hot", "probabilities"):
        entry = BY_NAME[name]
        x, y = entry.images()
        goal = Misclassify(margin)
        left[name] = int((~NAIVE(entry.target, x, y, threat=entry.threat, goal=goal).success).sum())
    assert left["scaled"] <= SPARE
    assert left["hot"] <= SPARE
    assert left["probabilities"] >= 50


def test_a_derivative_that_is_not_a_number():
    entry = BY_NAME["nan-gradient"]
    x, y = entry.images()
    assert slope(entry.target.fn, x, y).isnan().flatten(1).any(1).all()
    assert torch.allclose(entry.target.fn(x), entry.unmasked()(x), atol=1e-3)


@pytest.mark.parametrize("name", ["rippled", "noisy", "resized"])
def test_a_derivative_that_points_elsewhere(name):
    """The cosine between it and that of the net behind the ripples, which are half a unit high."""
    entry = BY_NAME[name]
    x, y = entry.images()
    cosine = cosine_similarity(slope(entry.target.fn, x, y).flatten(1), slope(entry.unmasked(), x, y).flatten(1))
    assert cosine.abs().median() < 0.2
    if name == "rippled":
        assert (entry.target.fn(x) - entry.unmasked()(x)).abs().max() <= 0.5 + 1e-4


def test_no_answer_is_no_right_answer():
    entry = BY_NAME["nan-output"]
    x, y = entry.images()
    out = entry.target.fn(x)
    unsure = entry.unmasked()(x).topk(2, 1).values.diff(dim=1)[:, 0] > -2
    assert torch.equal(out.isnan().any(1), unsure)
    assert entry.figures.naive <= SPARE
    result = NAIVE(entry.target, x, y, threat=entry.threat)
    assert result.success[unsure].all()
    assert result.x_adv.isfinite().all()


def test_winners_are_a_tenth_and_keep_their_values():
    layers = [layer for layer in BY_NAME["winners"].target.module if type(layer).__name__ == "Apply"]
    assert len(layers) == 3
    h = torch.randn(5, 4, 10, 10)
    out = layers[0](h)
    assert ((out != 0).flatten(1).sum(1) == 40).all()
    assert torch.equal(out[out != 0], h[out != 0])
    for image, kept in zip(h, out, strict=True):
        assert image[kept == 0].max() < image[kept != 0].min()


def test_in_a_batch_norm_a_row_depends_on_its_batch():
    entry = BY_NAME["batch-norm"]
    x, _ = entry.images()
    fn = entry.target.fn
    assert not torch.allclose(fn(x)[:10], fn(x[:10]), atol=0.1)
    assert torch.allclose(fn(x), entry.unmasked()(x), atol=1e-2)  # whose statistics are those of this batch
    assert torch.allclose(fn(x.flip(0)).flip(0), fn(x), atol=1e-2)


@pytest.mark.parametrize("name", RANDOM)
def test_random_ones_differ_from_call_to_call_and_vote_as_before(name):
    entry = BY_NAME[name]
    x, _ = entry.images()
    with entry.target.frozen():
        assert not torch.equal(entry.target.fn(x), entry.target.fn(x))
    assert abs(right(entry, x, 0) - right(entry, x, 5)) <= SPARE


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_it_is_the_same_each_time_and_near_what_is_behind(entry):
    x, _ = entry.images()
    with fork_rng(0):
        out = entry.target.fn(x)
    with fork_rng(0):
        assert torch.equal(out.nan_to_num(), entry.target.fn(x).nan_to_num())
    assert not entry.target.in_training
    mean = torch.stack([entry.target.fn(x) for _ in range(entry.draws)]).mean(0)
    assert (mean.argmax(1) == entry.unmasked()(x).argmax(1)).sum() >= 85


def test_every_entry_has_its_figures():
    assert list(FIGURES) == list(STANDARD) == [entry.name for entry in ENTRIES]
    assert len(set(FIGURES)) == len(ENTRIES)
