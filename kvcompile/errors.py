"""The one exception a user of kvcompile meets, and its kind for a result that is not good enough."""

from __future__ import annotations

from hydra.errors import CompactHydraException

BUG = "report this as a bug of kvcompile, with the command and the model"  # the fix of what no user can mend


class KvcompileError(CompactHydraException):  # type: ignore[misc]
    """A mistake the user can mend: the rule, what was given, the fix, on one line.

    Derives from Hydra's compact exception, so the command line prints it without a traceback.
    """

    def __init__(self, rule: str, got: object = None, fix: str | None = None) -> None:
        parts = [rule.rstrip(".")]
        if got is not None:
            parts[0] += f", got {got}"
        if fix:
            parts.append(f"Fix: {fix.rstrip('.')}")
        super().__init__(". ".join(parts) + ".")
        self.rule, self.got, self.fix = rule, got, fix


class QualityError(KvcompileError):
    """A compile that works and is not good enough. output: where its report is; summary: the row of its numbers."""

    def __init__(
        self, rule: str, got: object, fix: str, output: str, summary: dict[str, float | int | str | None]
    ) -> None:
        super().__init__(rule, got, fix)
        self.output, self.summary = output, summary
