"""Exceptions and warnings. Every message names the argument, the value, the rule and what to do instead."""

from __future__ import annotations

__all__ = ["ArgumentError", "MissingExtraError", "RobustkitError", "RobustkitWarning", "ShapeError"]


class RobustkitError(Exception):
    """Base class of all errors that robustkit raises; exceptions of the model itself pass through unchanged."""


class ArgumentError(RobustkitError, ValueError):
    """An argument has an invalid value."""


class ShapeError(RobustkitError, ValueError):
    """A tensor, or the output of a model, has the wrong shape or dtype."""


class MissingExtraError(RobustkitError, ImportError):
    """An optional dependency is missing or cannot be imported; the message holds the install command."""

    def __init__(self, package: str, extra: str, cause: BaseException) -> None:
        super().__init__(
            f"{package} is needed here and cannot be imported ({type(cause).__name__}: {cause}); "
            f"install it with: pip install 'robustkit[{extra}]'"
        )


class RobustkitWarning(UserWarning):
    """The request was carried out, but with something that the reader of the result should know."""
