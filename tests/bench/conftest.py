"""What several tests of the bench need."""

import pytest

from robustkit.bench.execution import model_under_test as subject


@pytest.fixture
def use(monkeypatch):
    """Let every model spec mean the given module."""

    def chosen(net):
        monkeypatch.setattr(subject, "load_model", lambda spec, device, normalize: net)
        return net

    return chosen
