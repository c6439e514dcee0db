import pickle

import pytest
import torch

from robustkit import PGD, Linf, Result
from robustkit.errors import ArgumentError

NET = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2), torch.nn.Dropout()).train()
X = torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(0))
RESULT = PGD(steps=2)(NET, X, torch.zeros(5, dtype=torch.int64), threat=Linf(0.2))


def test_what_is_saved_is_loaded(tmp_path):
    RESULT.save(tmp_path / "a result.safetensors")
    loaded = Result.load(tmp_path / "a result.safetensors")
    for name in ("x_adv", "success", "rate", "size", "forwards", "backwards", "flat"):
        assert torch.equal(getattr(loaded, name), getattr(RESULT, name)), name
    assert (loaded.flags, loaded.notes, loaded.stages) == (RESULT.flags, RESULT.notes, RESULT.stages)
    assert loaded.flags[0].name == "train-mode"


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('code from a data file was executed')",)


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps(Bomb())])
def test_what_is_no_result_is_refused_and_not_executed(tmp_path, content):
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(ArgumentError, match="not a result"):
        Result.load(path)
    with pytest.raises(ArgumentError, match="not a result"):
        Result.load(tmp_path / "missing")


def test_parts_add_up():
    whole = Result.cat([RESULT, RESULT])
    assert len(whole) == 10
    assert whole.flags == RESULT.flags
    assert whole.stages[0].forwards == 2 * RESULT.stages[0].forwards
    assert "of 10 succeeded" in repr(whole)
    assert "train-mode" in repr(whole)
