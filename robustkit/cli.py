"""The command line: parses arguments, calls the package, returns exit codes. No logic."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["app", "main"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
zoo_app = typer.Typer(help="Reference models whose weights ship with the package.")
app.add_typer(zoo_app, name="zoo")


def _integer(text: str | int) -> int:
    """An integer; typer's own error does not quote the value."""
    try:
        return int(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} must be a whole number") from error


def _share(text: str | float) -> float:
    """A number, or a fraction such as 9/10."""
    from robustkit.bench.plan.specs import number

    return text if isinstance(text, float) else number(str(text), "the value")


def _integer_option(help: str) -> Any:  # Any: typer's own functions for options return it
    return typer.Option(help=help, parser=_integer, metavar="INT")


def _share_option(help: str) -> Any:
    return typer.Option(help=help, parser=_share, metavar="SHARE")


def _version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        typer.echo(f"robustkit {version('robustkit')}")
        raise typer.Exit


@app.callback()
def robustkit(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Measure the adversarial robustness of torch models."""


@app.command()
def bench(
    plan: Annotated[Path | None, typer.Option(help="A TOML file with the whole plan.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="zoo:NAME, file.py:factory, package:factory, torchvision:NAME, timm:NAME; may be repeated"),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="mnist-5k, digits, npz:FILE, folder:DIR, torchvision:NAME, file.py:factory")
    ] = None,
    limit: Annotated[int | None, _integer_option("The largest number of images.")] = None,
    offset: Annotated[int | None, _integer_option("Number of images to skip first.")] = None,
    threat: Annotated[list[str] | None, typer.Option(help="linf:8/255, l2:0.5, l1:12, pixels:1; may be repeated")] = None,
    attack: Annotated[
        list[str] | None, typer.Option(help="NAME or NAME:field=value,...: pgd:steps=20; see --list; may be repeated")
    ] = None,
    goal: Annotated[list[str] | None, typer.Option(help="misclassify, least-likely, classify-as:K; may be repeated")] = None,
    defence: Annotated[
        list[str] | None,
        typer.Option(help="none, quantise:levels=8, jpeg, median, gaussian-noise, random-resize, file.py:factory; repeatable"),
    ] = None,
    seed: Annotated[int | None, _integer_option("Seed of all random numbers; default 0.")] = None,
    block: Annotated[int | None, _integer_option("Images per block; each finished block is saved; default 100.")] = None,
    batch_size: Annotated[int | None, _integer_option("The largest batch for the model; default 100.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N")] = None,
    threads: Annotated[int | None, _integer_option("Threads of torch in each worker; default 1.")] = None,
    workers: Annotated[int, _integer_option("Number of processes; it does not change the results.")] = 1,
    normalize: Annotated[
        str | None, typer.Option(help="MEAN,STD to normalise the inputs of the models; or per channel: 0.5:0.5:0.5,0.2:0.2:0.2")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A new folder for the results; default: under runs/, named by date and time.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in --out.")] = False,
    save_adversarial: Annotated[
        bool, typer.Option("--save-adversarial", help="Save the images of unsolved examples too.")
    ] = False,
    start_from: Annotated[
        list[str] | None,
        typer.Option(
            help="An earlier run on the same images, or a file with x_adv (npz, safetensors), to start from; repeatable"
        ),
    ] = None,
    fail_under: Annotated[float | None, _share_option("Exit 1 if a robust accuracy is below this share.")] = None,
    baseline: Annotated[Path | None, typer.Option(help="The folder of a run to compare with.")] = None,
    fail_if_worse: Annotated[
        float | None, _share_option("Exit 1 if a robust accuracy is below that of --baseline by more than this.")
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="Write records and gates as JUnit XML.")] = None,
    format: Annotated[str, typer.Option(help="text or json, on standard output")] = "text",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Try a few images, print the estimated cost and time, and stop.")
    ] = False,
    list_names: Annotated[
        bool, typer.Option("--list", help="List the available models, data, threats, attacks and goals.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Measure the robustness of models; prints a table and writes results.json and report.html to a folder.

    Without options it attacks two reference models on real digits and takes about a minute.
    """
    from robustkit.commands.bench import RunOptions, bench_command
    from robustkit.commands.listing import list_command

    if list_names:
        list_command()
        return
    from robustkit.bench.plan.request import Request

    request = Request(
        plan,
        model,
        data,
        limit,
        offset,
        threat,
        attack,
        goal,
        seed,
        block,
        batch_size,
        device,
        threads,
        normalize,
        save_adversarial or None,
        start_from,
        defence,
    )
    options = RunOptions(out, resume, workers, fail_under, baseline, fail_if_worse, junit, format, dry_run)
    code = bench_command(request, options)
    if code:
        raise typer.Exit(code)


@app.command()
def compare(
    run_a: Annotated[Path, typer.Argument(help="The folder of the first run, such as the old version.")],
    run_b: Annotated[Path, typer.Argument(help="The folder of the second run, such as the new version.")],
    format: Annotated[str, typer.Option(help="text or json")] = "text",
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Compare the robustness of two runs image by image, with exact tests."""
    from robustkit.commands.compare import compare_command

    compare_command(run_a, run_b, format)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The folder of a run, finished or not.")],
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Write report.html of a run again and print its table."""
    from robustkit.commands.report import report_command

    report_command(run)


@app.command()
def attack(
    model: Annotated[str, typer.Option(help="As for bench.")],
    data: Annotated[str, typer.Option(help="As for bench.")],
    threat: Annotated[str, typer.Option(help="As for bench.")],
    out: Annotated[Path, typer.Option(help="A new npz file: x and y as --data npz:FILE reads them, success, size, index.")],
    attack: Annotated[str, typer.Option(help="As for bench.")] = "pgd",
    goal: Annotated[str, typer.Option(help="As for bench.")] = "misclassify",
    defence: Annotated[str, typer.Option(help="As for bench.")] = "none",
    limit: Annotated[int | None, _integer_option("The largest number of images.")] = None,
    offset: Annotated[int, _integer_option("Number of images to skip first.")] = 0,
    seed: Annotated[int, _integer_option("Seed of all random numbers.")] = 0,
    batch_size: Annotated[int, _integer_option("The largest batch for the model.")] = 100,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    normalize: Annotated[str | None, typer.Option(help="As for bench.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Run one attack and write the adversarial images."""
    from robustkit.bench.plan.plan import Case, Plan
    from robustkit.commands.attack import attack_command

    case = Case(model, threat, attack, goal, defence)
    plan = Plan(
        (case,), data, offset, limit, seed, batch_size=batch_size, device=device, normalize=normalize, save_adversarial=True
    )
    attack_command(plan, out)


@app.command()
def train(
    model: Annotated[
        str, typer.Option(help="file.py:factory or package.module:factory; training starts from the model that it returns.")
    ],
    data: Annotated[str, typer.Option(help="As for bench, for example mnist-5k:train.")],
    out: Annotated[Path, typer.Option(help="A new .safetensors file for the weights.")],
    loss: Annotated[
        str, typer.Option(help="standard, or madry: on adversarial examples that --attack finds in --threat")
    ] = "madry",
    threat: Annotated[str | None, typer.Option(help="As for bench; required by madry.")] = None,
    attack: Annotated[str, typer.Option(help="As for bench.")] = "pgd:steps=10,reach=2.5",
    epochs: Annotated[int, _integer_option("Number of epochs.")] = 10,
    batch_size: Annotated[int, _integer_option("Number of images per step.")] = 128,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 1e-3,
    seed: Annotated[int, _integer_option("Seed of the initial weights, the order and the noise.")] = 0,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train a model, adversarially by default, and write its weights for `bench --model SPEC@weights=FILE`."""
    from robustkit.commands.train import TrainOptions, train_command

    train_command(TrainOptions(model, data, loss, threat, attack, epochs, batch_size, lr, seed), out)


@app.command()
def crosscheck(
    model: Annotated[str, typer.Option(help="As for bench.")] = "zoo:mnist-cnn",
    data: Annotated[str, typer.Option(help="As for bench.")] = "mnist-5k",
    limit: Annotated[int, _integer_option("The largest number of images.")] = 256,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Run the same attacks through foolbox and other installed libraries, and compare image by image."""
    from robustkit.commands.crosscheck import crosscheck_command

    if crosscheck_command(model, data, limit):
        raise typer.Exit(1)


@zoo_app.command("list")
def zoo_list() -> None:
    """List the reference models and their scores."""
    from robustkit.commands.zoo import list_command

    list_command()


@zoo_app.command("train")
def zoo_train(
    name: Annotated[str, typer.Argument(help="Name of a reference model.")],
    out: Annotated[Path, typer.Option(help="Folder for the weights and the card.")] = Path("."),
) -> None:
    """Train a reference model by its recipe."""
    from robustkit.commands.zoo import train_command

    train_command(name, out)


@zoo_app.command("verify")
def zoo_verify(name: Annotated[list[str] | None, typer.Argument(help="Names; default all.")] = None) -> None:
    """Recompute the hashes and accuracies of the cards."""
    from robustkit.commands.zoo import verify_command

    if verify_command(name):
        raise typer.Exit(1)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 done, 1 a check failed, 2 an invalid request, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        # No arguments print the help; typer returns 130 for Ctrl-C.
        code = int(app(argv or ["--help"], prog_name="robustkit", standalone_mode=False) or 0)
    except Exception as error:
        if "--debug" in argv or not _is_request_error(error):
            raise
        print(f"robustkit: {_one_line(error)}", file=sys.stderr)
        return 2
    if code == 130:
        print("robustkit: interrupted", file=sys.stderr)
    return code


def _is_request_error(error: Exception) -> bool:
    """Whether the request was wrong; any other error is a defect and shows its traceback."""
    from robustkit.errors import RobustkitError

    return isinstance(error, RobustkitError) or _is_of_typer(error)


def _is_of_typer(error: Exception) -> bool:
    # typer vendors click and exports only BadParameter; index 2 is its base ClickException, which all usage errors have.
    return isinstance(error, typer.BadParameter.__mro__[2])


def _one_line(error: Exception) -> str:
    """An error in one line; where an option is wrong, with the command that prints the help."""
    message = " ".join(str(getattr(error, "format_message", error.__str__)()).split())
    if not _is_of_typer(error):
        return message
    context: typer.Context | None = getattr(error, "ctx", None)
    return f"{message.rstrip('.')}; see {context.command_path if context else 'robustkit'} --help"
