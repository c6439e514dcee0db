"""The shipped reference models match their cards and can be trained again."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from robustkit import zoo
from robustkit.data import load as load_data
from robustkit.errors import ArgumentError
from robustkit.zoo import nets
from robustkit.zoo.cards import recipe_to_dict
from robustkit.zoo.recipes import RECIPES, ShiftedBatches

NAMES = ("mnist-cnn", "mnist-cnn-robust", "digits-mlp")
# Lower bounds of the accuracies, with a margin for a model that is trained again.
AT_LEAST = {"mnist-cnn": (0.97, 0.0), "mnist-cnn-robust": (0.96, 0.8), "digits-mlp": (0.96, 0.0)}


def same_machine(card):
    """Return whether this machine should reproduce the bits of the card."""
    return (card.torch, card.processor) == (torch.__version__, torch.backends.cpu.get_cpu_capability())


def test_the_names_of_the_models():
    assert set(zoo.names()) == set(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_shipped_weights_score_what_their_card_says(name):
    card, model = zoo.card(name), zoo.load(name)
    assert zoo.verify(name) == ()
    data = load_data(card.scores.data)
    with torch.no_grad():
        accuracy = (model(data.x).argmax(1) == data.y).double().mean().item()
    if same_machine(card):
        assert accuracy == card.scores.clean_accuracy
    clean, robust = AT_LEAST[name]
    assert card.scores.clean_accuracy >= clean
    assert card.scores.robust_accuracy >= robust
    assert (card.scores.n, card.scores.data_hash) == (len(data), data.hash)


@pytest.mark.parametrize("name", NAMES)
def test_a_card_describes_its_model(name):
    card, model = zoo.card(name), zoo.load(name)
    assert card.name == name
    assert card.recipe == recipe_to_dict(RECIPES[name])
    assert card.seed == RECIPES[name].seed
    assert card.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert card.scores.threat == repr(RECIPES[name].threat)
    assert card.weights_licence == "Apache-2.0"
    assert "licence" in card.data_licence
    assert (zoo.WEIGHTS / f"{name}.safetensors").stat().st_size < 1_500_000


@pytest.mark.parametrize("name", NAMES)
def test_load_returns_a_new_model_in_evaluation_mode(name):
    model, other = zoo.load(name), zoo.load(name)
    assert not any(part.training for part in model.modules())
    with torch.no_grad():
        next(model.parameters()).zero_()
    assert next(other.parameters()).abs().sum() > 0


@pytest.mark.slow
def test_training_again_gives_the_shipped_bytes(tmp_path):
    shipped = zoo.card("digits-mlp")
    torch.manual_seed(123)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    card = zoo.train("digits-mlp", tmp_path / "new folder")
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    assert zoo.verify("digits-mlp", tmp_path / "new folder") == ()
    assert card == zoo.card("digits-mlp", tmp_path / "new folder")
    if same_machine(shipped):
        assert card.sha256 == shipped.sha256
        assert card.scores == shipped.scores
    else:
        assert abs(card.scores.clean_accuracy - shipped.scores.clean_accuracy) <= 0.02


@pytest.fixture
def copy(tmp_path):
    for suffix in ("json", "safetensors"):
        shutil.copyfile(zoo.WEIGHTS / f"digits-mlp.{suffix}", tmp_path / f"digits-mlp.{suffix}")
    return tmp_path


def test_modified_weights_are_reported_and_not_loaded(copy):
    path = copy / "digits-mlp.safetensors"
    weights = load_file(path)
    weights["1.bias"][0] += 1e-3
    save_file(weights, path)
    (difference,) = zoo.verify("digits-mlp", copy)
    assert "weights of zoo:digits-mlp have SHA-256" in difference
    with pytest.raises(ArgumentError, match="reinstall robustkit, or train the model again"):
        zoo.load("digits-mlp", copy)


@pytest.mark.parametrize(
    ("key", "value"),
    [("clean_accuracy", 0.99), ("robust_accuracy", 0.5), ("n", 360), ("data_hash", "0" * 16), ("threat", "Linf(eps=0.2)")],
)
def test_a_wrong_card_is_reported(copy, key, value):
    path = copy / "digits-mlp.json"
    card = json.loads(path.read_text())
    card["scores"][key] = value
    path.write_text(json.dumps(card))
    (difference,) = zoo.verify("digits-mlp", copy)
    assert difference.startswith(f"{key} of zoo:digits-mlp is ")
    assert repr(value) in difference


@pytest.mark.parametrize("call", [zoo.card, zoo.load, zoo.verify, lambda name: zoo.train(name, "never")])
def test_an_unknown_name_is_refused_with_the_known_names(call):
    with pytest.raises(
        ArgumentError, match="name='nope' is not a reference model; there are mnist-cnn, mnist-cnn-robust, digits-mlp"
    ):
        call("nope")


def test_missing_and_damaged_files_are_refused(copy):
    with pytest.raises(ArgumentError, match="is not a card"):
        zoo.load("mnist-cnn", copy)
    (copy / "digits-mlp.json").write_text("{}")
    with pytest.raises(ArgumentError, match="is not a card"):
        zoo.verify("digits-mlp", copy)
    with pytest.raises(ArgumentError, match="folder="):
        zoo.train("digits-mlp", copy / "digits-mlp.json" / "inside")


def test_networks_map_images_to_logits_row_by_row():
    for make, shape in ((nets.mnist_cnn, (5, 1, 28, 28)), (nets.digits_mlp, (5, 1, 8, 8))):
        torch.manual_seed(0)
        net, x = make().double(), torch.rand(shape, dtype=torch.float64)
        out = net(x)
        assert out.shape == (5, 10)
        torch.testing.assert_close(out[2:3], net(x[2:3]))


def test_batches_cover_the_data_once_per_epoch_in_a_new_order():
    data = load_data("digits").part(0, 60)
    batches, again = ShiftedBatches(data, 20, 0, seed=1), ShiftedBatches(data, 20, 0, seed=1)
    first, second = (torch.cat([x for x, _ in batches]) for _ in range(2))
    assert len(batches) == 3
    assert not torch.equal(first, second)
    assert torch.equal(first, torch.cat([x for x, _ in again]))
    pixels = [sorted(x.flatten().tolist() for x in part) for part in (data.x, first, second)]
    assert pixels[0] == pixels[1] == pixels[2]
    for x, y in batches:
        for image, label in zip(x, y, strict=True):
            assert label in data.y[(data.x == image).flatten(1).all(1)]


def test_images_are_shifted_by_at_most_the_given_pixels():
    data = load_data("digits").part(0, 20)
    seen = set()
    for _ in range(20):
        batches = ShiftedBatches(data, 20, 2, seed=len(seen))
        ((x, y),) = batches
        for image, label in zip(x[:, 0], y, strict=True):
            moves = {
                (down, right)
                for original in torch.nn.functional.pad(data.x[data.y == label][:, 0], [2] * 4)
                for down in range(5)
                for right in range(5)
                if torch.equal(original[down : down + 8, right : right + 8], image)
            }
            assert moves
            seen |= moves
    assert len(seen) == 25
