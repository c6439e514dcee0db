"""The command line: fast help, exit codes, Ctrl-C, and the difference between a defect and a wrong request."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

import robustkit
from robustkit import cli, zoo
from robustkit.commands import bench as command
from robustkit.commands import crosscheck as crosscheck_command
from robustkit.commands import zoo as zoo_command
from robustkit.errors import ArgumentError

COMMANDS = (
    [],
    ["bench"],
    ["compare"],
    ["report"],
    ["attack"],
    ["train"],
    ["crosscheck"],
    ["zoo"],
    ["zoo", "list"],
    ["zoo", "train"],
    ["zoo", "verify"],
)
PLAIN = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}


def process(*words, **options):
    """`python -m robustkit` as a real process."""
    return subprocess.run([sys.executable, "-m", "robustkit", *words], capture_output=True, text=True, env=PLAIN, **options)


def test_help_and_version_of_all_commands_do_not_import_torch():
    code = (
        "import sys; from robustkit.cli import main\n"
        f"for words in {[*([*words, '--help'] for words in COMMANDS), [], ['--version']]}:\n"
        "    assert main(words) == 0, words\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=PLAIN)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("Usage: robustkit") == len(COMMANDS) + 1
    assert done.stdout.endswith(f"robustkit {robustkit.__version__}\n")


def test_the_help_of_bench_lists_every_option_of_the_design(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main(["bench", "--help"]) == 0
    shown = capsys.readouterr().out
    options = [
        "plan",
        "model",
        "data",
        "limit",
        "offset",
        "threat",
        "attack",
        "goal",
        "defence",
        "seed",
        "block",
        "batch-size",
        "device",
        "threads",
        "workers",
        "normalize",
        "out",
        "resume",
        "save-adversarial",
        "fail-under",
        "baseline",
        "fail-if-worse",
        "junit",
        "format",
        "dry-run",
        "list",
        "debug",
        "start-from",
    ]
    assert set(re.findall(r"--([a-z-]+)", shown)) == {*options, "help"}


def test_the_package_runs_as_a_module():
    done = process("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"robustkit {robustkit.__version__}\n", "")


@pytest.mark.slow
def test_a_process_writes_a_run_on_an_ascii_terminal(tmp_path):
    case = ["--model", "zoo:digits-mlp", "--data", "digits", "--limit", "20", "--threat", "linf:0.1", "--goal", "least-likely"]
    words = ["bench", *case, "--attack", "fgsm", "--out", "a"]
    done = subprocess.run(
        [sys.executable, "-m", "robustkit", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**PLAIN, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert [record["goal"] for record in results["records"]] == ["least-likely"]
    assert f"{results['records'][0]['success_rate']:.1%}" in done.stdout


SLOW = [
    "--model",
    "zoo:digits-mlp",
    "--data",
    "digits",
    "--limit",
    "100",
    "--threat",
    "linf:0.001",
    "--attack",
    "fgsm",
    "--attack",
    "pgd:steps=10000000",
]


@pytest.mark.slow
def test_ctrl_c_keeps_finished_cases(tmp_path):
    words = [sys.executable, "-m", "robustkit", "bench", *SLOW, "--out", str(tmp_path / "out")]
    # A background shell makes the tests ignore SIGINT, and child processes inherit that.
    default_sigint = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    running = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=PLAIN, preexec_fn=default_sigint
    )
    while not (tmp_path / "out" / "report.html").exists() and running.poll() is None:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate()
    assert (running.returncode, out) == (130, "")
    resume = f"robustkit bench --out {tmp_path / 'out'} --resume"
    assert err == f"robustkit: finished blocks are in {tmp_path / 'out'}; continue with: {resume}\nrobustkit: interrupted\n"
    (record,) = json.loads((tmp_path / "out" / "results.json").read_text())["records"]
    assert record["attack"] == "fgsm"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        ".lock",
        "results.json",
        "report.html",
        "plan.toml",
        "examples",
    }


def raising(error):
    def broken(*_):
        raise error

    return broken


def test_an_interruption_exits_with_130(monkeypatch, capsys):
    monkeypatch.setattr(command, "bench_command", raising(KeyboardInterrupt()))
    assert cli.main(["bench"]) == 130
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.strip() == "robustkit: interrupted"


def test_a_wrong_request_exits_with_2_and_one_line(monkeypatch, capsys):
    monkeypatch.setattr(command, "bench_command", raising(ArgumentError("two\n  lines")))
    assert cli.main(["bench"]) == 2
    assert capsys.readouterr() == ("", "robustkit: two lines\n")


def test_debug_shows_the_traceback_of_a_wrong_request(monkeypatch):
    monkeypatch.setattr(command, "bench_command", raising(ArgumentError("wrong")))
    with pytest.raises(ArgumentError, match="wrong"):
        cli.main(["bench", "--debug"])


@pytest.mark.parametrize(
    "error", [RuntimeError("x"), ValueError("x"), KeyError("x"), OSError(5, "x"), AssertionError("x"), ImportError("x")]
)
def test_a_defect_is_not_a_wrong_request(monkeypatch, error):
    monkeypatch.setattr(command, "bench_command", raising(error))
    with pytest.raises(type(error)) as caught:
        cli.main(["bench"])
    assert caught.value is error


@pytest.mark.slow
def test_a_defect_shows_its_traceback_and_exits_with_1():
    code = (
        "import robustkit.commands.bench as c, robustkit.__main__ as m, sys\n"
        "c.bench_command = lambda *_: 1 / 0\nsys.argv = ['robustkit', 'bench']\nm.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=PLAIN)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr


def test_zoo_list_shows_every_model_without_cutting(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["zoo", "list"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "…" not in printed.out
    assert max(map(len, printed.out.splitlines())) <= 80
    for name in zoo.names():
        card = zoo.card(name)
        (row,) = [line.split() for line in printed.out.splitlines() if f"zoo:{name} " in line]
        figures = [f"{card.scores.clean_accuracy:.1%}", f"{card.scores.robust_accuracy:.1%}"]
        under = card.scores.threat.partition(",")[0] + ")"
        assert row == [f"zoo:{name}", f"{card.parameters:,}", card.scores.data, f"{card.scores.n:,}", *figures, under]


@pytest.mark.parametrize(
    ("words", "differing", "code", "lines"),
    [
        ([], (), 0, [f"zoo:{name} agrees with its card" for name in zoo.names()]),
        (["digits-mlp"], (), 0, ["zoo:digits-mlp agrees with its card"]),
        (["digits-mlp"], ("digits-mlp",), 1, ["[red]n of zoo:digits-mlp is 1 " + "x" * 100, "second"]),
        (
            ["digits-mlp", "mnist-cnn"],
            ("digits-mlp",),
            1,
            ["[red]n of zoo:digits-mlp is 1 " + "x" * 100, "second", "zoo:mnist-cnn agrees with its card"],
        ),
    ],
)
def test_zoo_verify_exits_with_1_when_a_card_differs(monkeypatch, capsys, words, differing, code, lines):
    differences = lambda name: (f"[red]n of zoo:{name} is 1 " + "x" * 100, "second") if name in differing else ()  # noqa: E731
    monkeypatch.setattr(zoo, "verify", differences)
    assert cli.main(["zoo", "verify", *words]) == code
    assert capsys.readouterr() == ("\n".join(lines) + "\n", "")


def test_zoo_verify_recomputes_the_scores(capsys):
    assert cli.main(["zoo", "verify", "digits-mlp"]) == 0
    assert capsys.readouterr().out == "zoo:digits-mlp agrees with its card\n"


def test_zoo_train_prints_the_path_of_the_weights(monkeypatch, capsys, tmp_path):
    calls = []
    monkeypatch.setattr(zoo_command.zoo, "train", lambda name, out: calls.append((name, out)) or zoo.card(name))
    out = tmp_path / "[bold]new :smile:"
    assert cli.main(["zoo", "train", "digits-mlp", "--out", str(out)]) == 0
    assert calls == [("digits-mlp", out)]
    assert capsys.readouterr().out.startswith(f"{out}/digits-mlp.safetensors: 97.2% clean, ")


@pytest.mark.slow
def test_crosscheck_compares_the_requested_model_and_data(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(crosscheck_command, "crosscheck", lambda model, x, y: seen.append((model, x, y)) or [])
    assert cli.main(["crosscheck", "--model", "zoo:digits-mlp", "--data", "digits", "--limit", "7"]) == 0
    ((model, x, y),) = seen
    assert (tuple(x.shape), tuple(y.shape), model(x).shape) == ((7, 1, 8, 8), (7,), (7, 10))
    assert "0 of 0 agree" in capsys.readouterr().out
