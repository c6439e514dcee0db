"""Functions named on the command line: `path/to/file.py:name` and `package.module:name`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from robustkit.errors import ArgumentError

__all__ = ["load_factory"]


def load_factory(spec: str) -> Callable[[], Any]:
    """Import the function that `spec` names.

    The file or module is imported, so its code runs: name only code that you trust. A file can import what lies in its own
    folder, a module what lies in the current folder.

    Args:
        spec: `path/to/file.py:name` or `package.module:name`; the last colon separates, so a path may hold colons.

    Returns:
        A function without arguments that calls the named one; any exception that it raises becomes an ArgumentError.

    Raises:
        ArgumentError: No such file, module or function, or the import raised; the message says which.
    """
    source, colon, name = spec.rpartition(":")
    if not (colon and source and name.isidentifier()):
        raise ArgumentError(f"{spec!r} must be path/to/file.py:name or package.module:name")
    folder = Path(source).resolve().parent if source.endswith(".py") else Path.cwd()
    module = _import(spec, source, folder)
    function = getattr(module, name, None)
    if not callable(function):
        available = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ArgumentError(f"{spec!r}: {source} has no function {name}; it has {', '.join(available) or 'none'}")

    def factory() -> Any:
        with _first_in_path(folder):
            try:
                return function()
            except (Exception, SystemExit) as error:
                raise ArgumentError(
                    f"{spec!r} raised {_one_line(error)}; it is called without arguments: repair it, or name another function"
                ) from error

    return factory


def _import(spec: str, source: str, folder: Path) -> ModuleType:
    path = Path(source)
    if source.endswith(".py") and not path.is_file():
        raise ArgumentError(f"{spec!r}: there is no file {source}; paths are relative to {Path.cwd()}")
    with _first_in_path(folder):
        try:
            return _import_file(path.resolve()) if source.endswith(".py") else importlib.import_module(source)
        except ModuleNotFoundError as error:
            if error.name is not None and source.split(".")[: error.name.count(".") + 1] == error.name.split("."):
                raise ArgumentError(
                    f"{spec!r}: there is no module {error.name}; install it, or give path/to/file.py:name"
                ) from error
            raise ArgumentError(f"{spec!r}: importing {source} raised {_one_line(error)}; install what it needs") from error
        except (Exception, SystemExit) as error:
            raise ArgumentError(f"{spec!r}: importing {source} raised {_one_line(error)}; repair it first") from error


def _import_file(path: Path) -> ModuleType:
    """Run a file as a module whose name holds a hash of the path, so that files of equal names do not collide."""
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be read as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look up modules by name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _first_in_path(folder: Path) -> Iterator[None]:
    """Put `folder` first in the module search path."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _one_line(error: BaseException) -> str:
    """Type and message of an exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
