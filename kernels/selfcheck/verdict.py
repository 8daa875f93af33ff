"""What a check of one kernel on one device has found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """Whether a kernel is right, and how fast it is beside the library.

    problem: what is wrong with it, in words; empty where it agrees with the reference. error: the largest relative
    difference (RMS) from the reference that was seen. kernel, library: seconds of a call (0: not timed).
    report: path of a bug report, where there is a problem and it could be written.
    """

    problem: str = ""
    error: float = 0.0
    kernel: float = 0.0
    library: float = 0.0
    report: str = ""

    @property
    def right(self) -> bool:
        """Whether nothing is wrong with it."""
        return not self.problem

    @property
    def taken(self) -> bool:
        """Whether `kernels=auto` takes it: it is right, and faster than the library."""
        return self.right and self.kernel < self.library

    @property
    def reason(self) -> str:
        """Why it is taken, or is not."""
        if self.problem:
            return self.problem
        compared = "faster" if self.taken else "not faster"
        return f"{compared} than the library here, {self.kernel * 1e3:.3g} ms beside {self.library * 1e3:.3g} ms"
