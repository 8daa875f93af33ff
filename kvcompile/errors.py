"""The one exception a user of kvcompile meets, and its kind for a result that is not good enough."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import CompactHydraException

BUG = "report this as a bug of kvcompile, with the command and the model"  # the fix of what no user can mend
LONGEST = 200  # characters of what was given that an error repeats
FOREIGN = 120  # of what stood in somebody else's file


class KvcompileError(CompactHydraException):  # type: ignore[misc]
    """A mistake that its user can mend, on one line: what must hold, what was found, what to do.

    Derives from Hydra's compact exception, so that the command line prints it without a traceback.

    Attributes:
        rule: what must hold.
        got: what was found in its place, or None.
        fix: what to do, or None where the rule says it.

    Examples:
        >>> try:
        ...     kvcompile.compile(model, recipe="snapkv", overrides=["budget=0"])
        ... except kvcompile.KvcompileError as error:
        ...     print(error)
        stack.snapkv: budget must be in (0, 1] or a whole number of tokens, got 0.0.
    """

    def __init__(self, rule: str, got: object = None, fix: str | None = None) -> None:
        parts = [rule.rstrip(".")]
        if got is not None:
            parts[0] += f", got {shortened(got)}"
        if fix:
            parts.append(f"Fix: {fix.rstrip('.')}")
        super().__init__(" ".join((". ".join(parts) + ".").split()))
        self.rule, self.got, self.fix = rule, got, fix


class QualityError(KvcompileError):
    """A compile that works and is not good enough. output: where its report is; summary: the row of its numbers."""

    def __init__(
        self, rule: str, got: object, fix: str, output: str, summary: dict[str, float | int | str | None]
    ) -> None:
        super().__init__(rule, got, fix)
        self.output, self.summary = output, summary


def shortened(value: object, longest: int = LONGEST) -> str:
    """`value` as text, with its middle left out where it is too long to be read in an error."""
    text, half = str(value), longest // 2
    return text if len(text) <= longest else f"{text[:half]} ... {text[-half:]}"


@contextmanager
def wrapped_errors(rule: object, fix: str) -> Iterator[None]:
    """Turn whatever goes wrong inside into one line that begins with `rule`: somebody else's data is read there."""
    try:
        yield
    except KvcompileError as error:
        got = None if error.got is None else shortened(error.got, FOREIGN)
        raise KvcompileError(f"{rule}: {error.rule}", got, error.fix or fix) from error
    except Exception as error:
        got = shortened(f"{type(error).__name__}: {first_line(error)}", FOREIGN)
        raise KvcompileError(str(rule), got, fix) from error


def first_line(error: BaseException) -> str:
    """The first line of somebody else's message that says something."""
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)
