"""Fixtures of the bench tests."""

import pytest

from robustkit.bench.execution import model_under_test


@pytest.fixture
def use(monkeypatch):
    """Makes every model spec load the given module."""

    def use_net(net):
        monkeypatch.setattr(model_under_test, "load_model", lambda spec, device, normalize: net)
        return net

    return use_net
