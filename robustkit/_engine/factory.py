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
    """The function that `spec` names, to be called without arguments.

    The file or module is imported, so its code runs: name only code that you trust. What lies beside a file, or in the
    current folder for a module, can be imported by it.

    Args:
        spec: `path/to/file.py:name` or `package.module:name`; the last colon separates, so a path may hold colons.

    Returns:
        A function without arguments that calls the named one; an exception of its own comes out as ArgumentError.

    Raises:
        ArgumentError: No such file, module or function, or the import raised; the message says which.
    """
    where, colon, name = spec.rpartition(":")
    if not (colon and where and name.isidentifier()):
        raise ArgumentError(f"{spec!r} must be path/to/file.py:name or package.module:name")
    folder = Path(where).resolve().parent if where.endswith(".py") else Path.cwd()
    module = _imported(spec, where, folder)
    function = getattr(module, name, None)
    if not callable(function):
        found = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ArgumentError(f"{spec!r}: {where} has no function {name}; it has {', '.join(found) or 'none'}")

    def factory() -> Any:
        with _findable(folder):
            try:
                return function()
            except (Exception, SystemExit) as error:
                raise ArgumentError(
                    f"{spec!r} raised {_told(error)}; it is called without arguments: repair it, or name another function"
                ) from error

    return factory


def _imported(spec: str, where: str, folder: Path) -> ModuleType:
    path = Path(where)
    if where.endswith(".py") and not path.is_file():
        raise ArgumentError(f"{spec!r}: there is no file {where}; paths are relative to {Path.cwd()}")
    with _findable(folder):
        try:
            return _executed(path.resolve()) if where.endswith(".py") else importlib.import_module(where)
        except ModuleNotFoundError as error:
            if error.name is not None and where.split(".")[: error.name.count(".") + 1] == error.name.split("."):
                raise ArgumentError(
                    f"{spec!r}: there is no module {error.name}; install it, or give path/to/file.py:name"
                ) from error
            raise ArgumentError(f"{spec!r}: importing {where} raised {_told(error)}; install what it needs") from error
        except (Exception, SystemExit) as error:
            raise ArgumentError(f"{spec!r}: importing {where} raised {_told(error)}; repair it first") from error


def _executed(path: Path) -> ModuleType:
    """The file run as a module of its own name, so that equal file names do not meet."""
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be read as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up by name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _findable(folder: Path) -> Iterator[None]:
    """`folder` first in the search for modules."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _told(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
