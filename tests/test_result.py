import pickle

import pytest
import torch

from robustkit import PGD, Linf, Result
from robustkit._engine.ledger import Check, Ledger, Stage
from robustkit.errors import ArgumentError

NET = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2), torch.nn.Dropout()).train()
X = torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(0))
RESULT = PGD(steps=2)(NET, X, torch.zeros(5, dtype=torch.int64), threat=Linf(0.2))


def test_a_saved_result_can_be_loaded(tmp_path):
    RESULT.save(tmp_path / "a result.safetensors")
    loaded = Result.load(tmp_path / "a result.safetensors")
    for name in ("x_adv", "success", "rate", "size", "forwards", "backwards", "flat"):
        assert torch.equal(getattr(loaded, name), getattr(RESULT, name)), name
    assert torch.equal(loaded.solver, RESULT.solver)
    assert (loaded.flags, loaded.notes, loaded.stages) == (RESULT.flags, RESULT.notes, RESULT.stages)
    assert loaded.checks == RESULT.checks
    assert loaded.flags[0].name == "train-mode"


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('code from a data file was executed')",)


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps(Bomb())])
def test_files_that_are_not_results_are_refused_and_not_executed(tmp_path, content):
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(ArgumentError, match="not a result"):
        Result.load(path)
    with pytest.raises(ArgumentError, match="not a result"):
        Result.load(tmp_path / "missing")


def test_cat_sums_the_stages():
    whole = Result.cat([RESULT, RESULT])
    assert len(whole) == 10
    assert whole.flags == RESULT.flags
    assert whole.stages[0].forwards == 2 * RESULT.stages[0].forwards
    assert "of 10 succeeded" in repr(whole)
    assert "train-mode" in repr(whole)


def result_of(names, solver, **fields):
    n = len(solver)
    return Result(
        torch.zeros(n, 1),
        torch.tensor(solver) >= 0,
        *torch.zeros(5, n),
        stages=tuple(Stage(name, 1, 2, solver.count(index)) for index, name in enumerate(names)),
        solver=torch.tensor(solver),
        **fields,
    )


def test_cat_renumbers_the_solver_by_the_joint_stages():
    whole = Result.cat([result_of(["clean", "search"], [0, 1, -1]), result_of(["search", "more"], [1, 0, -1])])
    assert [stage.name for stage in whole.stages] == ["clean", "search", "more"]
    assert whole.solver.tolist() == [0, 1, -1, 2, 1, -1]
    assert [stage.solved for stage in whole.stages] == [1, 2, 1]
    learned = whole.plus_cost(Ledger(6, torch.device("cpu")))
    assert [stage.name for stage in learned.stages] == ["learning", "clean", "search", "more"]
    assert learned.solver.tolist() == [1, 2, -1, 3, 2, -1]


def test_cat_sums_checks_by_name():
    parts = [
        result_of(["a"], [0], checks=(Check("gaps", 1, 4),)),
        result_of(["a"], [0], checks=(Check("ties", 0, 1), Check("gaps", 2, 4))),
    ]
    assert Result.cat(parts).checks == (Check("gaps", 3, 8), Check("ties", 0, 1))
