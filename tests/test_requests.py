"""Malformed requests: exit code 2, one clear line that names the value and the way out, nothing written, nothing executed."""

import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from robustkit.cli import main

NETS = """
import torch
from torch import nn

number = 3
instance = nn.Flatten()


class Returns(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x)


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def mnist():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def stops(x):
    raise KeyError("deep inside")


def late(x):
    if x.requires_grad:
        raise ValueError("only under attack")
    return x.flatten(1)[:, :10]


def torn(x):
    out = x.flatten(1)[:, :10].exp()
    out += 1
    return out


def nothing(): return None
def function(): return net
def needs(size): return net()
def broken(): raise OSError("no such thing")
def raises(): return Returns(stops)
def exits(): return Returns(lambda x: exit(0))
def hides(): return Returns(late)
def tears(): return Returns(torn)
def none(): return Returns(lambda x: None)
def pair(): return Returns(lambda x: (x.flatten(1), x))
def dictionary(): return Returns(lambda x: {"logits": x.flatten(1)})
def one_row(): return Returns(lambda x: x.flatten(1)[:1, :10])
def more_rows(): return Returns(lambda x: torch.cat([x, x]).flatten(1)[:, :10])
def one_column(): return Returns(lambda x: x.flatten(1)[:, :1])
def integers(): return Returns(lambda x: (x * 16).long().flatten(1)[:, :10])
def images(): return Returns(lambda x: x)
def three(): return Returns(lambda x: x.flatten(1)[:, :3])
def nan(): return Returns(lambda x: x.flatten(1)[:, :10] * torch.nan)


def data_of_text(): return "x", "y"
def data_alone(): return torch.rand(3, 1, 8, 8)
"""


ATTACKS = """
from dataclasses import dataclass
from typing import Literal
from robustkit import Pixels
from robustkit.attack import Attack


@dataclass(frozen=True)
class Choosy(Attack):
    recipe: Literal["paper", "scipy"] = "paper"
    inner: Attack | None = None
    serves = (Pixels,)

    def run(self, problem):
        raise KeyError("never asked")
"""


class Trap:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


X = np.random.default_rng(0).random((12, 1, 8, 8), dtype=np.float32)
Y = np.arange(12) % 10


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Tiny models, weights and data, valid and broken, in a folder with a space in its name."""
    made = tmp_path_factory.mktemp("a folder")
    (made / "nets.py").write_text(NETS)
    (made / "import.py").write_text("raise RuntimeError('at import')")
    (made / "file").write_text("mine")
    attacks(made)
    weights(made)
    arrays(made)
    (made / "empty" / "class").mkdir(parents=True)
    (made / "broken" / "class").mkdir(parents=True)
    (made / "broken" / "class" / "image.png").write_text("no image")
    for size in (4, 5):
        (made / "sizes" / "class").mkdir(parents=True, exist_ok=True)
        Image.new("L", (size, size)).save(made / "sizes" / "class" / f"{size}.png")
    plans(made)
    for name, limit in (("run", []), ("shorter", ["--limit", "5"])):
        assert main([word.replace("{}", str(made)) for word in [*words_of({"--out": f"{{}}/{name}"}), *limit]]) == 0
    broken = made / "broken run"
    shutil.copytree(made / "run", broken)
    (file,) = broken.rglob("*.safetensors")
    file.write_bytes(pickle.dumps(Trap(made / "executed")))
    return made


def attacks(made):
    """Installed packages that publish attacks, valid and broken."""
    (made / "site").mkdir()
    (made / "site" / "some_attacks.py").write_text(ATTACKS)
    published = {
        "sound": "choosy = some_attacks:Choosy\nsame = some_attacks:Choosy",
        "other": "same = some_attacks:Choosy",
        "broken": "broken = no_module_at_all:Attack\nfunction = some_attacks:dataclass",
    }
    for name, entries in published.items():
        info = made / "site" / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[robustkit.attacks]\n{entries}\n")


def plans(made):
    sound = f'data = "npz:{made}/sound.npz"\nmodels = ["{made}/nets.py:net"]\nthreats = ["linf:0.1"]\n'
    (made / "typo.toml").write_text(sound.replace("threats", "thraets"))
    (made / "words.toml").write_text("limit = many\n")
    (made / "nothing.toml").write_text("")
    (made / "unknown.toml").write_text(sound + 'attacks = ["nope"]\n')
    (made / "hashes.toml").write_text(sound + f'[hashes]\n"{made}/nets.py:net" = "0000"\n')
    (made / "sound.toml").write_text(sound)


def weights(made):
    sound = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).state_dict()
    torch.save({"1.weight": Trap(made / "executed")}, made / "trap.pt")
    (made / "trap.pth").write_bytes(pickle.dumps(Trap(made / "executed")))
    (made / "trap.pkl").write_bytes(pickle.dumps(Trap(made / "executed")))
    torch.save(sound, made / "cut.pt")
    (made / "cut.pt").write_bytes((made / "cut.pt").read_bytes()[:-200])
    save_file(sound, made / "cut.safetensors")
    (made / "cut.safetensors").write_bytes((made / "cut.safetensors").read_bytes()[:-20])
    (made / "text.safetensors").write_text("no weights at all")
    save_file(nn.Linear(3, 2).state_dict(), made / "other.safetensors")
    torch.save(nn.Flatten(), made / "whole.pt")


def arrays(made):
    trap = np.array([Trap(made / "executed")] * 12, dtype=object)
    unsound = {
        "objects": {"x": trap, "y": Y},
        "object_labels": {"x": X, "y": trap},
        "without_y": {"x": X},
        "empty": {"x": X[:0], "y": Y[:0]},
        "nan": {"x": np.where(X > 0.9, np.nan, X), "y": Y},
        "bright": {"x": X * 255, "y": Y},
        "shape": {"x": X[:, 0], "y": Y},
        "double": {"x": X.astype(np.float64), "y": Y},
        "lengths": {"x": X, "y": Y[:5]},
        "negative": {"x": X, "y": Y - 1},
        "labels": {"x": X, "y": Y + 7},
        "real_labels": {"x": X, "y": Y + 0.5},
        "sound": {"x": X, "y": Y},
    }
    for name, held in unsound.items():
        np.savez(made / f"{name}.npz", **held)
    np.save(made / "single.npy", X)
    (made / "text.npz").write_text("no archive")
    (made / "pickle.npz").write_bytes(pickle.dumps(Trap(made / "executed")))


SOUND = {
    "--model": "{}/nets.py:net",
    "--data": "npz:{}/sound.npz",
    "--threat": "linf:0.1",
    "--attack": "fgsm",
    "--out": "{}/out",
}


def model(name, *parts):
    return {"--model": f"{{}}/nets.py:{name}"}, parts


def filled(file, *parts):
    return {"--model": f"{{}}/nets.py:net@weights={{}}/{file}"}, (file, *parts)


def npz(name, *parts):
    return {"--data": f"npz:{{}}/{name}.npz"}, (f"{name}.npz", *parts)


def option(name, value, *parts):
    return {f"--{name}": value}, parts


ROWS = {
    # models
    "no such form": option("model", "resnet", "model 'resnet' does not exist", "zoo:NAME, path/to/file.py:factory"),
    "no model": option("model", "", "model '' does not exist", "zoo:NAME"),
    "unknown zoo name": option("model", "zoo:nope", "'zoo:nope'", "there are mnist-cnn, mnist-cnn-robust, digits-mlp"),
    "no file": option("model", "{}/none.py:net", "none.py:net", "there is no file", "paths are relative to"),
    "no module": option("model", "no.module:net", "'no.module:net'", "there is no module", "install it"),
    "no function": model("nope", "nets.py:nope'", "has no function nope", "it has", "net"),
    "not a function": model("number", "nets.py:number'", "has no function number"),
    "no name": option("model", "{}/nets.py:", "nets.py:'", "must be path/to/file.py:name"),
    "raises at import": option("model", "{}/import.py:net", "import.py", "RuntimeError: at import", "repair it"),
    "raises when called": model("broken", "nets.py:broken'", "OSError: no such thing", "repair it"),
    "needs arguments": model("needs", "nets.py:needs'", "size", "called without arguments"),
    "an instance": model("instance", "nets.py:instance'", "called without arguments"),
    "returns None": model("nothing", "nets.py:nothing'", "returned NoneType", "must return a torch nn.Module"),
    "returns a function": model("function", "nets.py:function'", "returned function", "must return a torch nn.Module"),
    "raises in forward": model(
        "raises", "nets.py:raises'", "KeyError", "deep inside", "(12, 1, 8, 8)", "must accept the images of the data"
    ),
    "exits in forward": model("exits", "nets.py:exits'", "SystemExit", "must accept the images of the data"),
    "raises under attack": model(
        "hides", "nets.py:hides'", "ValueError", "only under attack", "must accept the images of the data"
    ),
    "raises in its gradient": model("tears", "nets.py:tears'", "gradient", "RuntimeError", "must be differentiable"),
    "says None": model("none", "nets.py:none'", "returned NoneType", "needs one tensor of logits (N, C)"),
    "says a pair": model("pair", "nets.py:pair'", "returned tuple", "needs one tensor of logits", "lambda x: model(x)[0]"),
    "says one row": model("one_row", "nets.py:one_row'", "12 images", "(1, 10)", "must return logits"),
    "says more rows": model("more_rows", "nets.py:more_rows'", "12 images", "(24, 10)", "must return logits"),
    "says one column": model("one_column", "nets.py:one_column'", "(12, 1)", "logits (N, C), C >= 2", "torch.cat([torch.zeros"),
    "says a dictionary": model("dictionary", "nets.py:dictionary'", "returned dict", "model(x)[0]"),
    "says integers": model("integers", "nets.py:integers'", "torch.int64", "needs logits"),
    "says images": model("images", "nets.py:images'", "(12, 1, 8, 8)", "needs logits"),
    "has too few classes": model("three", "nets.py:three'", "labels run from 0 to 9", "must lie in [0, 3)"),
    "wants other images": model("mnist", "nets.py:mnist'", "(12, 1, 8, 8)", "must accept the images of the data"),
    "a model of other data": option(
        "model", "zoo:mnist-cnn", "zoo:mnist-cnn", "(12, 1, 8, 8)", "must accept the images of the data"
    ),
    # weights
    "no weights": filled("none.pt", "there is no weights file", "paths are relative to"),
    "a pickle by name": filled("trap.pkl", "must end in .safetensors, .pt or .pth"),
    "a pickle inside": filled("trap.pt", "save the state_dict() alone"),
    "a bare pickle": filled("trap.pth", "save the state_dict() alone"),
    "a whole module": filled("whole.pt", "save the state_dict() alone"),
    "half a .pt": filled("cut.pt", "broken", "save the state_dict() alone"),
    "half a .safetensors": filled("cut.safetensors", "is not a readable safetensors file"),
    "text as weights": filled("text.safetensors", "is not a readable safetensors file"),
    "weights of another": filled("other.safetensors", "does not fit the model", "1.weight"),
    "weights of a folder": filled("empty", "there is no weights file"),
    # data
    "unknown data": option("data", "nope", "data='nope'", "give mnist-5k"),
    "no data": option("data", "", "data=''", "give mnist-5k"),
    "no archive": npz("none", "there is no file", "paths are relative to"),
    "objects": npz("objects", "pickled objects are never loaded", "np.savez"),
    "object labels": npz("object_labels", "pickled objects are never loaded"),
    "a pickle as data": npz("pickle", "pickled objects are never loaded"),
    "text as data": npz("text", "cannot be read", "np.savez"),
    "one array": option("data", "npz:{}/single.npy", "single.npy", "single array", "np.savez"),
    "without labels": npz("without_y", "has no array y", "np.savez"),
    "NaN": npz("nan", "nan", "in [0, 1]"),
    "bytes as floats": npz("bright", "in [0, 1]", "scale it"),
    "a lost axis": npz("shape", "(12, 8, 8)", "(N, C, H, W)"),
    "doubles": npz("double", "float64", "float32 (N, C, H, W)"),
    "no images": npz("empty", "(0, 1, 8, 8)", "one label per image"),
    "lengths differ": npz("lengths", "(12, 1, 8, 8)", "(5,)", "one label per image"),
    "negative labels": npz("negative", "-1", "labels must be integers 0, 1, 2"),
    "real labels": npz("real_labels", "float64", "labels must be integers 0, 1, 2"),
    "labels beyond the classes": npz("labels", "from 7 to 16", "has 10 classes", "must lie in [0, 10)"),
    "no folder": option("data", "folder:{}/none", "none", "there is no folder"),
    "an empty folder": option("data", "folder:{}/empty", "empty", "one sub-folder of images for each class"),
    "a broken image": option("data", "folder:{}/broken", "image.png", "move it"),
    "images of two sizes": option("data", "folder:{}/sizes", "4x4", "5x5", "resize them"),
    "text from a factory": option("data", "{}/nets.py:data_of_text", "data_of_text", "x has shape ()"),
    "no pair from a factory": option("data", "{}/nets.py:data_alone", "data_alone", "must return a pair (x, y)"),
    # threats
    "unknown norm": option("threat", "l3:1", "'l3:1'", "linf:8/255, l2:0.5"),
    "no eps": option("threat", "linf", "'linf'", "linf:8/255"),
    "empty eps": option("threat", "linf:", "eps=''", "such as 8/255"),
    "eps of zero": option("threat", "linf:0", "'linf:0'", "above 0"),
    "negative eps": option("threat", "l2:-0.5", "'l2:-0.5'", "above 0"),
    "eps of one to zero": option("threat", "l2:1/0", "'1/0'", "such as 8/255"),
    "eps in words": option("threat", "l1:much", "'much'", "such as 8/255"),
    "infinite eps": option("threat", "l2:inf", "'inf'", "such as 8/255"),
    "eps in bytes": option("threat", "linf:8", "'linf:8'", "divide by 255"),
    "half a pixel": option("threat", "pixels:1.5", "1.5", "whole number"),
    "more pixels than there are": option("threat", "pixels:65", "'pixels:65'", "64 locations", "take fewer"),
    "far more pixels": option("threat", "pixels:1e30", "'pixels:1e30'", "64 locations", "take fewer"),
    # attacks
    "unknown attack": option("attack", "nope", "'nope'", "there are fgsm, ifgsm, mifgsm, pgd"),
    "unknown field": option("attack", "pgd:stpes=3", "'stpes=3'", "steps, reach, step_size, random_start"),
    "field of none": option("attack", "fgsm:steps=3", "'steps=3'", "its fields: none"),
    "an unknown layer": option("attack", "uap-singular:layer=conv9", "layer='conv9'", "this model has"),
    "no candidates": option("attack", "deepfool:candidates=0", "candidates=0", "at least 1"),
    "more than all fooled": option("attack", "uap-deepfool:fooling=1.5", "fooling=1.5", "at most 1"),
    "no steps": option("attack", "pgd:steps=0", "steps=0", "at least 1"),
    "half a step": option("attack", "pgd:steps=2.5", "steps='2.5'", "whole number"),
    "perhaps": option("attack", "pgd:random_start=maybe", "'maybe'", "true or false"),
    "a field without value": option("attack", "pgd:steps", "'steps'", "field=value"),
    "a field twice": option("attack", "pgd:steps=1,steps=2", "steps is given twice", "leave one out"),
    # attacks of other packages
    "unknown anywhere": option("attack", "choosey", "'choosey' does not exist", "there are fgsm", "choosy"),
    "a broken package": option("attack", "broken", "'broken'", "'broken' 1.0", "No module named", "install what it needs"),
    "a function as attack": option(
        "attack", "function", "'broken' 1.0", "is not a class derived from Attack", "the entry point must name a class"
    ),
    "one name of two": option("attack", "same", "'other' 1.0 and 'sound' 1.0", "uninstall all but one"),
    "a threat it does not serve": option("attack", "choosy", "'choosy' does not serve threat 'linf:0.1'", "serves pixels:K"),
    "none of the choices": option("attack", "choosy:recipe=nope", "recipe='nope'", "must be paper or scipy"),
    "an attack in an attack": option("attack", "choosy:inner=pgd", "inner='pgd' cannot be written", "give it in Python"),
    # defences
    "unknown defence": option("defence", "nope", "'nope' does not exist", "none, quantise, jpeg, median"),
    "unknown field of a defence": option("defence", "median:width=3", "'width=3'", "its fields: size, draws"),
    "a defence that cannot be": option("defence", "median:size=1", "'median:size=1'", "at least 2"),
    "a defence wider than the images": option("defence", "median:size=30", "(12, 1, 8, 8)", "at least 16"),
    "no file of a defence": option("defence", "{}/none.py:made", "none.py:made", "there is no file"),
    "a model as defence": option("defence", "{}/nets.py:net", "returned Sequential", "robustkit.defence.Defence"),
    # goals
    "unknown goal": option("goal", "nope", "'nope'", "misclassify, least-likely, classify-as:K"),
    "negative class": option("goal", "classify-as:-1", "'classify-as:-1'", "classify-as:K"),
    "class beyond": option("goal", "classify-as:99", "'classify-as:99'", "classes 0 to 9"),
    "class far beyond": option("goal", "classify-as:" + "9" * 40, "9999", "classify-as:K"),
    # numbers
    "no image": option("limit", "0", "limit=0", "at least 1"),
    "limit in words": option("limit", "x", "--limit", "'x' must be a whole number", "robustkit bench --help"),
    "offset beyond": option("offset", "12", "offset=12", "[0, 12)"),
    "negative offset": option("offset", "-1", "offset=-1", "at least 0"),
    "no batch": option("batch-size", "0", "batch_size=0", "at least 1"),
    "seed in words": option("seed", "x", "--seed", "'x' must be a whole number"),
    "half a seed": option("seed", "1.5", "--seed", "'1.5' must be a whole number"),
    "no such device": option("device", "nonsense", "device='nonsense'", "write cpu"),
    "a device without memory": option("device", "meta", "device='meta'", "write cpu"),
    "a device that is not there": option("device", "cuda:99", "device='cuda:99'", "write cpu"),
    # existing outputs and missing options
    "out exists": option("out", "{}/empty", "empty", "nothing is overwritten", "name a new folder"),
    "out is a file": option("out", "{}/file", "file", "nothing is overwritten", "name a new folder"),
    "out under a file": option("out", "{}/file/out", "file/out", "cannot be written", "name another folder"),
    "no data option": option("data", None, "--data is missing", "for example: robustkit bench --model"),
    "no threat option": option("threat", None, "--threat is missing", "for example: robustkit bench --model"),
    "unknown option": option("nope", "x", "No such option", "--nope", "robustkit bench --help"),
}


@pytest.fixture
def refused(folder, capsys, monkeypatch):
    """Run a command that must be refused and return its error message; no file may have changed."""
    monkeypatch.syspath_prepend(str(folder / "site"))
    before = listing(folder)

    def run(words):
        code = main([word.replace("{}", str(folder)) for word in words])
        printed = capsys.readouterr()
        assert (code, printed.out) == (2, ""), printed.err
        return printed.err

    yield run
    assert listing(folder) == before


def listing(folder):
    return {(path, path.stat().st_size) for path in folder.rglob("*") if "__pycache__" not in path.parts}


def words_of(changes):
    return ["bench", *(word for pair in (SOUND | changes).items() if pair[1] is not None for word in pair)]


def attack_words(changes):
    sound = {name: SOUND[name] for name in ("--model", "--data", "--threat")} | {"--out": "{}/out.npz"}
    return [word for pair in (sound | changes).items() for word in pair]


def train_words(changes):
    sound = {name: SOUND[name] for name in ("--model", "--data")} | {"--out": "{}/out.safetensors", "--loss": "standard"}
    return [word for pair in (sound | changes).items() for word in pair]


PLAN, RUN = ["bench", "--plan"], ["--out", "{}/run", "--resume"]
OTHERS = [
    (["benhc"], ("'benhc'", "robustkit --help")),
    (["--nope"], ("--nope", "robustkit --help")),
    (["bench", "word"], ("word", "robustkit bench --help")),
    (["bench", "--limit"], ("--limit", "robustkit --help")),
    (["zoo"], ("Missing command", "robustkit zoo --help")),
    (["zoo", "nope"], ("'nope'", "robustkit zoo --help")),
    (["zoo", "train"], ("'name'", "robustkit zoo train --help")),
    (["zoo", "train", "nope", "--out", "{}/out"], ("'nope'", "there are mnist-cnn")),
    (["zoo", "train", "digits-mlp", "--out", "{}/file/out"], ("file/out", "give another folder")),
    (["zoo", "verify", "nope"], ("'nope'", "there are mnist-cnn")),
    (["crosscheck", "--model", "nope"], ("'nope'", "zoo:NAME")),
    (["crosscheck", "--data", "nope"], ("'nope'", "give mnist-5k")),
    (["crosscheck", "--data", "digits", "--limit", "0"], ("limit=0", "at least 1")),
    (["crosscheck", "--limit", "x"], ("'x'", "must be a whole number")),
    (["crosscheck", "--data", "digits"], ("zoo:mnist-cnn", "must accept the images of the data")),
    (["crosscheck", "--data", "npz:{}/labels.npz", "--model", "{}/nets.py:net"], ("from 7 to 16", "must lie in [0, 10)")),
    (["bench", "--data", "digits", "--out", "{}/out"], ("zoo:mnist-cnn", "must accept the images of the data")),
    # plans
    (
        [*PLAN, "{}/typo.toml", "--out", "{}/out"],
        ("typo.toml", "'thraets' is not a key of the plan", "its keys are", "threats"),
    ),
    ([*PLAN, "{}/words.toml", "--out", "{}/out"], ("words.toml", "is not TOML", "line 1", "correct that line")),
    ([*PLAN, "{}/nothing.toml", "--out", "{}/out"], ("nothing.toml", "data is missing")),
    ([*PLAN, "{}/unknown.toml", "--out", "{}/out"], ("'nope'", "there are fgsm")),
    ([*PLAN, "{}/hashes.toml", "--out", "{}/out"], ("the plan was made with 0000", "[hashes]")),
    ([*PLAN, "{}/none.toml", "--out", "{}/out"], ("none.toml", "cannot be read", "name a TOML file")),
    ([*PLAN, "{}/trap.pth", "--out", "{}/out"], ("trap.pth", "name a TOML file")),
    ([*PLAN, "{}/sound.toml", "--limit", "3"], ("--limit cannot be combined with --plan", "sound.toml")),
    # resuming
    ([*words_of({"--out": "{}/run"}), "--resume", "--seed", "3"], ("different: seed", "name a new folder", "--resume")),
    ([*words_of({"--out": "{}/run", "--attack": "pgd"}), "--resume"], ("different: cases", "name a new folder")),
    ([*words_of({"--out": "{}/file"}), "--resume"], ("is not a folder", "name a new folder")),
    ([*words_of({"--out": "{}/empty"}), "--resume"], ("contains 'class' but no run", "name a new folder")),
    (words_of({"--out": "{}/run"}), ("nothing is overwritten", "resume its run with --resume")),
    ([*words_of({"--out": None}), "--resume"], ("--resume needs --out DIR", "the run to resume")),
    # options of the run and its gates
    ([*words_of({}), "--workers", "0"], ("workers=0", "at least 1")),
    ([*words_of({}), "--workers", "two"], ("'two'", "whole number")),
    ([*words_of({}), "--block", "0"], ("block=0", "at least 1")),
    ([*words_of({}), "--threads", "0"], ("threads=0", "at least 1")),
    ([*words_of({}), "--fail-under", "90"], ("fail_under=90", "[0, 1]", "write 0.9 for 90 %")),
    ([*words_of({}), "--fail-under", "high"], ("'high'", "such as 8/255")),
    ([*words_of({}), "--fail-if-worse", "0.1"], ("fail_if_worse=0.1", "needs --baseline RUN")),
    (
        [*words_of({}), "--baseline", "{}/none"],
        ("none'", "no readable results.json", "name a folder written by robustkit bench"),
    ),
    ([*words_of({}), "--baseline", "{}/broken run"], ("not a block of a run", "resume the run")),
    ([*words_of({}), "--format", "xml"], ("format='xml'", "text or json")),
    ([*words_of({}), "--normalize", "0.5"], ("normalize='0.5'", "MEAN,STD", "for example 0.1307,0.3081")),
    ([*words_of({}), "--normalize", "0.5,zero"], ("normalize='zero'", "number")),
    ([*words_of({}), "--normalize", "0.5,0"], ("std=[0.0]", "above zero")),
    ([*words_of({}), "--normalize", "1:2,3"], ("2 means and 1 standard deviations", "one of each per channel")),
    (
        [*words_of({"--model": "zoo:digits-mlp"}), "--normalize", "0.5,0.5"],
        ("normalises its inputs itself", "leave out --normalize"),
    ),
    # the other commands
    (["compare", "{}/run", "{}/none"], ("none'", "no readable results.json")),
    (["compare", "{}/run", "{}/empty"], ("empty'", "no readable results.json")),
    (["compare", "{}/run", "{}/shorter"], ("shorter'", "data")),
    (["compare", "{}/run", "{}/run", "--format", "xml"], ("format='xml'", "text or json")),
    (["compare", "{}/run"], ("'run_b'", "robustkit compare --help")),
    (["report", "{}/none"], ("none'", "no readable results.json")),
    (["report", "{}/broken run"], ("not a block of a run", "resume the run")),
    (["attack", *attack_words({"--out": "{}/a.npy"})], ("a.npy", "must end in .npz")),
    (["attack", *attack_words({"--out": "{}/sound.npz"})], ("sound.npz", "nothing is overwritten")),
    (["attack", *attack_words({"--out": "{}/file/a.npz"})], ("file/a.npz", "name another file")),
    (["attack", *attack_words({"--attack": "nope"})], ("'nope'", "there are fgsm")),
    (["train", *train_words({"--loss": "trades"})], ("loss='trades'", "standard and madry")),
    (["train", *train_words({"--loss": "madry"})], ("threat is missing", "--threat linf:0.1", "--loss standard")),
    (["train", *train_words({"--out": "{}/w.pt"})], ("w.pt", "must end in .safetensors")),
    (["train", *train_words({"--out": "{}/cut.safetensors"})], ("cut.safetensors", "nothing is overwritten")),
    (["train", *train_words({"--epochs": "0"})], ("epochs=0", "at least 1")),
    (["train", *train_words({"--lr": "0"})], ("lr=0", "above 0")),
    (
        ["train", *train_words({"--loss": "madry", "--threat": "linf:0.1", "--attack": "onepixel"})],
        ("'onepixel' does not serve", "it serves pixels:K"),
    ),
    (["train", *train_words({"--model": "{}/nets.py:nothing"})], ("NoneType", "must return a torch nn.Module")),
]


@pytest.mark.parametrize(("words", "parts"), OTHERS, ids=[" ".join(words)[-60:] for words, _ in OTHERS])
def test_other_wrong_requests_are_refused_in_one_line(refused, words, parts):
    check_message(refused(words), parts)


def check_message(text, parts):
    assert text.startswith("robustkit: ")
    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert "Traceback" not in text
    assert len(parts) >= 2
    for word in parts:
        assert word in text, text


@pytest.mark.parametrize("row", ROWS)
def test_a_wrong_request_is_refused_in_one_line(refused, row):
    changes, parts = ROWS[row]
    check_message(refused(words_of(changes)), parts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a cuda here")
def test_cuda_is_refused_where_there_is_none(refused):
    check_message(refused(words_of({"--device": "cuda"})), ("device='cuda'", "there is no cuda here"))


def test_the_unchanged_requests_are_accepted(folder, tmp_path, capsys):
    words = [word.replace("{}", str(folder)) for word in words_of({"--out": f"{tmp_path}/out"})]
    assert main(words) == 0
    assert (tmp_path / "out" / "report.html").exists()
    sound = [word.replace("{}", str(folder)) for word in ("bench", "--plan", "{}/sound.toml", "--out", f"{tmp_path}/two")]
    assert main(sound) == 0
    assert main(["compare", str(folder / "run"), f"{tmp_path}/out"]) == 0
    assert main(["report", f"{tmp_path}/out"]) == 0
    assert main(["attack", *(word.replace("{}", str(folder)) for word in attack_words({"--out": f"{tmp_path}/a.npz"}))]) == 0
    out = {"--out": f"{tmp_path}/w.safetensors", "--epochs": "1"}
    assert main(["train", *(word.replace("{}", str(folder)) for word in train_words(out))]) == 0


def test_logits_of_nan_are_misclassifications_not_a_wrong_request(folder, tmp_path, capsys):
    words = [word.replace("{}", str(folder)) for word in words_of({"--model": "{}/nets.py:nan", "--out": f"{tmp_path}/out"})]
    assert main(words) == 0
    assert "0.0% correct of 12 images" in " ".join(capsys.readouterr().out.split())


def test_the_trap_creates_a_file_when_it_is_loaded(folder, tmp_path):
    """A pickle that creates no file would make the tests above meaningless."""
    pickle.loads(pickle.dumps(Trap(tmp_path / "executed"))).close()
    assert (tmp_path / "executed").exists()
    assert not (folder / "executed").exists()


# Some of them as real processes; `make requests` runs all.
ALL = [words_of(changes) for changes, _ in ROWS.values()] + [words for words, _ in OTHERS]
MESSAGE_PARTS = [parts for _, parts in ROWS.values()] + [parts for _, parts in OTHERS]
AS_PROCESSES = range(len(ALL)) if os.environ.get("PROCESSES") else range(3, len(ALL), len(ALL) // 6)


@pytest.mark.slow
@pytest.mark.parametrize("number", AS_PROCESSES)
def test_a_real_process_prints_the_same_message(folder, number):
    before = listing(folder)
    words = [word.replace("{}", str(folder)) for word in ALL[number]]
    done = subprocess.run(
        [sys.executable, "-m", "robustkit", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder / "site")},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert " " in str(folder)
    check_message(done.stderr, MESSAGE_PARTS[number])
    assert listing(folder) == before


def test_there_are_at_least_60_requests():
    assert len(ALL) >= 60
