"""The command line: words in, calls of the package, exit codes out. No logic."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["app", "main"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
zoo_app = typer.Typer(help="Reference models whose weights ship with the package.")
app.add_typer(zoo_app, name="zoo")


def _whole(text: str | int) -> int:
    """A whole number; typer's own refusal does not say which value was meant."""
    try:
        return int(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} must be a whole number") from error


def _number(help: str) -> Any:  # Any: typer's own functions for options return it
    return typer.Option(help=help, parser=_whole, metavar="INT")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"robustkit {version('robustkit')}")
        raise typer.Exit


@app.callback()
def robustkit(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """How robust is a model, really?"""


@app.command()
def bench(
    model: Annotated[
        list[str] | None, typer.Option(help="zoo:NAME, file.py:factory, package:factory, torchvision:NAME")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="mnist-5k, digits, npz:FILE, folder:DIR, torchvision:NAME, file.py:factory")
    ] = None,
    limit: Annotated[int | None, _number("Take at most so many images.")] = None,
    offset: Annotated[int, _number("Pass over so many images first.")] = 0,
    threat: Annotated[list[str] | None, typer.Option(help="linf:8/255, l2:0.5, l1:12, pixels:1")] = None,
    attack: Annotated[
        list[str] | None, typer.Option(help="fgsm, ifgsm, mifgsm, pgd; with fields: pgd:steps=20,reach=3")
    ] = None,
    goal: Annotated[list[str] | None, typer.Option(help="misclassify, least-likely, classify-as:K")] = None,
    seed: Annotated[int, _number("Of all noise.")] = 0,
    batch_size: Annotated[int, _number("The most images that go through a model at once.")] = 100,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="A new folder; default one with the date under runs/.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Measure how robust models are: a table here, results.json and report.html in a folder.

    Without arguments: two reference models, four attacks, a thousand real digits, in ten seconds to a minute.
    """
    from robustkit.bench.command import Request, bench_command

    bench_command(Request(model, data, limit, offset, threat, attack, goal, seed, batch_size, device), out)


@app.command()
def crosscheck(
    model: Annotated[str, typer.Option(help="As for bench.")] = "zoo:mnist-cnn",
    data: Annotated[str, typer.Option(help="As for bench.")] = "mnist-5k",
    limit: Annotated[int, _number("Take at most so many images.")] = 256,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Run the same attacks through foolbox and other installed libraries, and compare image by image."""
    from robustkit.bench.command import crosscheck_command

    if crosscheck_command(model, data, limit):
        raise typer.Exit(1)


@zoo_app.command("list")
def zoo_list() -> None:
    """What ships, and how good it is."""
    from robustkit.zoo.command import list_command

    list_command()


@zoo_app.command("train")
def zoo_train(
    name: Annotated[str, typer.Argument(help="Name of a reference model.")],
    out: Annotated[Path, typer.Option(help="Folder for the weights and the card.")] = Path("."),
) -> None:
    """Train a reference model anew by its recipe."""
    from robustkit.zoo.command import train_command

    train_command(name, out)


@zoo_app.command("verify")
def zoo_verify(name: Annotated[list[str] | None, typer.Argument(help="Names; default all.")] = None) -> None:
    """Recompute what the cards say: hashes and accuracies."""
    from robustkit.zoo.command import verify_command

    if verify_command(name):
        raise typer.Exit(1)


def main(words: list[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 done, 1 a check failed, 2 the request was wrong, 130 interrupted."""
    words = sys.argv[1:] if words is None else words
    try:
        # Without words: what there is. Ctrl-C comes back as 130.
        code = int(app(words or ["--help"], prog_name="robustkit", standalone_mode=False) or 0)
    except Exception as error:
        if "--debug" in words or not _is_request_error(error):
            raise
        print(f"robustkit: {_told(error)}", file=sys.stderr)
        return 2
    if code == 130:
        print("robustkit: interrupted; what a bench had finished is in its folder", file=sys.stderr)
    return code


def _is_request_error(error: Exception) -> bool:
    """Whether the words were wrong, or what they named; anything else is a defect of ours and shows its traceback."""
    from robustkit.errors import RobustkitError

    return isinstance(error, RobustkitError) or _is_of_typer(error)


def _is_of_typer(error: Exception) -> bool:
    # typer brings its own copy of click's exceptions; a bad parameter is the one that it exports.
    return isinstance(error, typer.BadParameter.__mro__[2])


def _told(error: Exception) -> str:
    """An error in one line; where the words were wrong, with the place that says which are right."""
    message = " ".join(str(getattr(error, "format_message", error.__str__)()).split())
    if not _is_of_typer(error):
        return message
    context: typer.Context | None = getattr(error, "ctx", None)
    return f"{message.rstrip('.')}; see {context.command_path if context else 'robustkit'} --help"
