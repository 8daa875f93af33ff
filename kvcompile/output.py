"""Standard output that may fail without stopping the work: what cannot be printed is not lost."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from kvcompile.errors import KvcompileError
from kvcompile.paths import shortened

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ENAMETOOLONG)


class Output:
    """A text stream in front of another, None for a closed one. What cannot be written is dropped.

    `problem` says why, once something was; a reader that has seen enough (`| head`) is none.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.problem = None if stream is not None else "closed"
        self._stream: Any = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115
        if hasattr(self._stream, "reconfigure"):
            self._stream.reconfigure(errors="replace")  # of names that its encoding lacks

    def write(self, text: str) -> int:
        """Write, or drop."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered, or drop it."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        if not isinstance(error, BrokenPipeError):
            self.problem = error.strerror or str(error)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # the buffer is written once more when the process ends
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Named:
    """A text stream that hands on whole lines, each behind a name: many processes may write where it leads."""

    def __init__(self, stream: Any, name: str) -> None:
        self._stream, self._name, self._begun = stream, name, ""

    def write(self, text: str) -> int:
        """Write the lines that are whole; blank ones are left out."""
        *lines, self._begun = (self._begun + text).split("\n")
        self._stream.write("".join(f"{self._name}{line}\n" for line in lines if line.strip()))
        return len(text)

    def finish(self) -> None:
        """Write what was begun."""
        self.write("\n")
        self.flush()

    def isatty(self) -> bool:
        """No: nothing can be drawn over."""
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def named_output(name: str) -> Iterator[None]:
    """Begin each line of standard output and standard error with a name."""
    streams = sys.stdout, sys.stderr
    out, err = named = Named(sys.stdout, name), Named(sys.stderr, name)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        for stream in named:
            stream.finish()


@contextmanager
def standard_output() -> Iterator[None]:
    """Put an `Output` in the place of `sys.stdout`, for good. Raises KvcompileError at the end for what it dropped."""
    _fill()
    output: Any = Output(sys.stdout)
    sys.stdout = output
    sys.stderr = sys.stderr or Output(None)
    yield
    output.flush()
    if output.problem:
        raise KvcompileError(
            "what is printed must have somewhere to go",
            f"standard output: {output.problem}",
            "send it to a terminal, a pipe or a file with room; what the command writes into folders is there",
        )


@contextmanager
def room_to_write(fix: str = "make room, or output=<elsewhere>") -> Iterator[None]:
    """Turn what a full device, a quota or a limit says into one line, with this `fix`. Raises KvcompileError."""
    try:
        yield
    except KvcompileError:
        raise
    except Exception as error:
        number = _number(error)
        if number not in NO_ROOM:
            raise
        said, name = os.strerror(number), getattr(error, "filename", None)
        raise KvcompileError("files must be written", f"{said}: {shortened(name)}" if name else said, fix) from error


def _number(error: Exception) -> int:
    """The system's number of an error; of what safetensors raises, as its text says. 0: it has none."""
    if isinstance(error, OSError):
        return error.errno or 0
    said = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(said[1]) if said else 0


def _fill() -> None:
    """Open the three standard numbers where they are closed: the next file opened would get one, and prints in it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
