"""What robustkit raises and warns: every error names the argument, the value, the rule and the way out."""

from __future__ import annotations

__all__ = ["ArgumentError", "MissingExtraError", "RobustkitError", "RobustkitWarning", "ShapeError"]


class RobustkitError(Exception):
    """Root of all errors that robustkit raises itself; a model's own exception passes through unchanged."""


class ArgumentError(RobustkitError, ValueError):
    """A value that no computation could make sense of."""


class ShapeError(RobustkitError, ValueError):
    """Tensors, or a model's output, whose shape or type does not fit the question."""


class MissingExtraError(RobustkitError, ImportError):
    """An optional dependency is not installed, or is broken; the message holds the install line."""

    def __init__(self, package: str, extra: str, cause: BaseException) -> None:
        super().__init__(
            f"{package} is needed here and cannot be imported ({type(cause).__name__}: {cause}); "
            f"install it with: pip install 'robustkit[{extra}]'"
        )


class RobustkitWarning(UserWarning):
    """Something was done as asked, but the reader of the result should know."""
