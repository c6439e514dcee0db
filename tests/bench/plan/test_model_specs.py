"""Model specs: every form, weights files that execute no code, hashes of the weights, and clear errors."""

import pickle
import sys
import types

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from robustkit import zoo
from robustkit.bench.plan.model_specs import load_model, model_hash
from robustkit.errors import ArgumentError, MissingExtraError

NETS = """
import torch
from torch import nn


def net():
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 3))


def tensor():
    return torch.ones(3)
"""
X = torch.linspace(0, 1, 8).reshape(2, 1, 2, 2)


class Trap:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def nets(tmp_path):
    (tmp_path / "some nets.py").write_text(NETS)
    return f"{tmp_path}/some nets.py:net"


def made():
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 3)).eval()


def test_a_zoo_spec_gives_the_model_of_the_zoo():
    model = load_model("zoo:digits-mlp")
    assert model_hash(model) == model_hash(zoo.load("digits-mlp"))


def test_the_model_of_a_factory_is_in_evaluation_mode(nets, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "nets_as_module.py").write_text(NETS)
    for spec in (nets, "nets_as_module:net"):
        model = load_model(spec)
        assert not any(part.training for part in model.modules())
        assert torch.equal(model(X), model(X))


@pytest.mark.parametrize("suffix", ["pt", "pth", "safetensors"])
def test_weights_are_loaded_into_the_model(nets, tmp_path, suffix):
    weights = made().state_dict()
    path = tmp_path / f"w: 1.{suffix}"
    save_file(weights, path) if suffix == "safetensors" else torch.save(weights, path)
    model = load_model(f"{nets}@weights={path}")
    assert torch.equal(model(X), made()(X))
    assert model_hash(model) == model_hash(made())


def test_the_hash_covers_every_weight_and_buffer_and_nothing_else():
    hashes = [model_hash(made())]
    for change in ("2.weight", "2.bias"):
        model = made()
        with torch.no_grad():
            model.state_dict()[change].view(-1)[-1] += 1e-6
        hashes.append(model_hash(model))
    hashes += [model_hash(made().double()), model_hash(nn.Sequential(made())), model_hash(nn.BatchNorm1d(2))]
    changed = nn.BatchNorm1d(2)
    changed.num_batches_tracked += 1
    hashes.append(model_hash(changed))
    assert len(set(hashes)) == len(hashes)
    assert all(len(name) == 16 and set(name) <= set("0123456789abcdef") for name in hashes)
    assert model_hash(made().train()) == hashes[0]


def test_the_hash_skips_objects_that_are_not_tensors():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"any": object()}

    torch.manual_seed(0)
    plain = nn.Linear(2, 2)
    extra = Extra(2, 2)
    with torch.no_grad():
        extra.weight.copy_(plain.weight), extra.bias.copy_(plain.bias)
    assert model_hash(extra) == model_hash(plain)
    assert model_hash(nn.Sequential(nn.Linear(2, 2).to(torch.bfloat16), nn.Flatten()))


@pytest.mark.parametrize("suffix", ["pt", "pth", "safetensors", "pkl", "bin"])
def test_a_pickle_in_a_weights_file_is_refused_without_executing_it(nets, tmp_path, suffix):
    done, path = tmp_path / "done", tmp_path / f"w.{suffix}"
    trap = {"2.weight": Trap(done)}
    torch.save(trap, path) if suffix in ("pt", "pth") else path.write_bytes(pickle.dumps(trap))
    rule = {"safetensors": "not a readable safetensors", "pkl": r"must end in \.safet", "bin": r"must end in \.safet"}
    with pytest.raises(ArgumentError, match=rule.get(suffix, "contains other objects than tensors, which could execute code")):
        load_model(f"{nets}@weights={path}")
    assert not done.exists()
    pickle.loads(pickle.dumps(Trap(done))).close()
    assert done.exists()  # the trap works


@pytest.mark.parametrize(
    "weights", [torch.ones(3), [1], {"state_dict": {}}, {"2.weight": torch.ones(3, 4)}, {1: torch.ones(1)}]
)
def test_weights_that_do_not_fit_are_refused(nets, tmp_path, weights):
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(ArgumentError, match=r"w\.pt does not fit the model: .+"):
        load_model(f"{nets}@weights={tmp_path}/w.pt")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nope", "model 'nope' does not exist; write zoo:NAME"),
        ("", "model '' does not exist"),
        ("zoo:nope", "model 'zoo:nope': .* there are mnist-cnn"),
        ("zoo:", "model 'zoo:'"),
        ("{folder}/none.py:net", "there is no file"),
        ("{nets}.py:net@weights=", "there is no file"),
        ("{file}:tensor", "returned Tensor; a factory must return a torch nn.Module"),
        ("{file}:net@weights=", "there is no weights file"),
        ("{file}:net@weights={folder}", "there is no weights file"),
    ],
)
def test_invalid_specs_are_refused(nets, tmp_path, spec, message):
    with pytest.raises(ArgumentError, match=message):
        load_model(spec.format(folder=tmp_path, nets=nets, file=f"{tmp_path}/some nets.py"))


@pytest.mark.parametrize("device", ["nonsense", "meta", "mps:x", "cpu:x", "cuda:", "cuda:-1", "cuda:9999", "", "CPU"])
def test_invalid_devices_are_refused_before_any_code_runs(tmp_path, device):
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'done')!r}, 'w')")
    with pytest.raises(ArgumentError, match="cannot be used; write cpu") as caught:
        load_model(f"{tmp_path}/trap.py:net", device)
    assert f"device={device!r}" in str(caught.value)
    assert not (tmp_path / "done").exists()


def test_a_missing_library_is_reported_with_the_command_that_installs_it(monkeypatch):
    for library in ("torchvision", "timm"):
        monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
        with pytest.raises(MissingExtraError, match=f"{library} is needed here .* pip install"):
            load_model(f"{library}:resnet50")


def test_models_of_other_libraries_have_their_own_normalisation(monkeypatch):
    """With stand-ins that follow the documentation of the libraries, which the tests do not install."""
    shift = types.SimpleNamespace(DEFAULT=types.SimpleNamespace(transforms=lambda: nn.Upsample(scale_factor=2)))
    models = types.ModuleType("torchvision.models")
    models.get_model_weights = lambda name: {"known": shift}[name]
    models.get_model = lambda name, weights: nn.AvgPool2d(4) if weights is shift.DEFAULT else None
    vision, timm = types.ModuleType("torchvision"), types.ModuleType("timm")
    timm.create_model = lambda name, pretrained: {("known", True): made()}[name, pretrained]
    timm.data = types.SimpleNamespace(resolve_model_data_config=lambda model: {"mean": (0.5,), "std": (0.25,)})
    for name, module in (("torchvision", vision), ("torchvision.models", models), ("timm", timm)):
        monkeypatch.setitem(sys.modules, name, module)
    assert torch.allclose(load_model("torchvision:known")(X), X.mean((2, 3), keepdim=True))
    assert torch.allclose(load_model("timm:known")(X), made()((X - 0.5) / 0.25))
    for library in ("torchvision", "timm"):
        with pytest.raises(ArgumentError, match=f"'{library}:nope' cannot be loaded: .*nope"):
            load_model(f"{library}:nope")
