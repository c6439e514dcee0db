"""The memory of a run hardly grows with the number of images; `make load` measures it for 200,000."""

import os
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

CODE = """
import resource, sys
from robustkit.cli import main
assert main(sys.argv[1:]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(tmp_path, n):
    """The peak memory in MiB of a run over n images, in a process of its own."""
    digits = load_digits()
    images = (digits.images * (255 / 16)).astype(np.uint8)
    np.savez(tmp_path / f"{n}.npz", x=np.resize(images, (n, 8, 8)), y=np.resize(digits.target, n))
    words = [
        "bench",
        "--model",
        "zoo:digits-mlp",
        "--data",
        f"npz:{tmp_path}/{n}.npz",
        "--threat",
        "linf:0.1",
        "--attack",
        "fgsm",
        "--out",
        str(tmp_path / f"run-{n}"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", CODE, *words], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1]) / 1024


@pytest.mark.slow
def test_many_more_images_need_hardly_more_memory(tmp_path):
    # As float32, 38,000 images take 9.3 MiB; about 100 bytes are kept of each, 3.8 MiB.
    assert peak(tmp_path, 40_000) - peak(tmp_path, 2_000) < 7
