"""English text that needs no download: the sentences of Python's own documentation, or of a file."""

from __future__ import annotations

import ast
import functools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvcompile.errors import KvcompileError

SHORTEST, LONGEST = 20, 400  # characters of a sentence worth keeping
HELD_OUT = 8  # one sentence in so many, those at the end
REFERENCE, LIBRARY = "reference", "library"
FIRST, LAST = ":first", ":last"  # behind the name of a text: half of it
MODULES = (  # of the standard library, with much to say and nothing in common with the language reference
    "argparse bisect codecs configparser contextlib csv datetime difflib doctest fractions ftplib functools getopt "
    "gettext heapq imaplib inspect ipaddress locale mailbox mimetypes optparse os pathlib pdb pickle pickletools "
    "platform plistlib pprint random shelve shutil smtplib socket socketserver ssl statistics string subprocess "
    "tarfile tempfile textwrap threading timeit trace traceback turtle typing uuid warnings weakref zipfile"
)

_PARAGRAPH = re.compile(r"\n\s*\n")
_BULLET = re.compile(r"^(?:[*+-]|\d+\.)\s+")
_EMPHASIS = re.compile(r"(?<![\w*\"])(\*{1,2})([^\s*](?:[^*]*[^\s*])?)\1(?![\w*\"])")
_ROLE = re.compile(r":\w+:`~?([^`<]+?)(?: <[^>]*>)?`|``([^`]+)``")
_FOOTNOTE = re.compile(r"\s*\[\d+\]")
_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"“(])")
_ABBREVIATED = re.compile(r"(?:\be\.g|\bi\.e|\betc|\bvs|\bcf|\bMr|\bMrs|\bDr)\.$")
_CODE = re.compile(r"::=|>>>|->|[|\\{}<>=_]{2}|[|`~^]|::")


def builtin() -> list[str]:
    """Sentences of the language reference that ships with Python, in a fixed order, without repetitions.

    Source: the standard library's `pydoc_data.topics`; the text follows the Python version.
    """
    from pydoc_data.topics import topics

    return from_text("\n\n".join(topics[name] for name in sorted(topics)))


def from_file(path: str | Path) -> list[str]:
    """Sentences of a UTF-8 text file. Raises KvcompileError if it cannot be read or holds none."""
    try:
        sentences = from_text(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise KvcompileError("a text source must be a readable UTF-8 file", f"{str(path)!r} ({error})") from error
    if not sentences:
        raise KvcompileError(
            f"a text source must hold sentences of {SHORTEST} to {LONGEST} characters", repr(str(path))
        )
    return sentences


@functools.cache
def _docstrings() -> tuple[str, ...]:
    return tuple(from_text("\n\n".join(_documented(Path(os.__file__).parent))))


def _documented(folder: Path) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for path in (folder / f"{name}.py" for name in MODULES.split()):
        if path.is_file():  # what a Python version does not have is left out
            nodes = (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, kinds))
            yield from (text for text in map(ast.get_docstring, nodes) if text)


def library() -> list[str]:
    """Sentences of the docstrings of Python's standard library, in a fixed order, without repetitions."""
    return list(_docstrings())


def sentences(source: str | Path | None = None) -> list[str]:
    """Sentences of the file `source`, or of a text that needs none: `reference` (None too) or `library`.

    `:first` or `:last` behind the name takes that half, so that what was chosen on one is proven on the other.
    """
    name = REFERENCE if source is None else str(source)
    if name.endswith((FIRST, LAST)):
        whole = sentences(name.removesuffix(FIRST).removesuffix(LAST))
        middle = len(whole) // 2
        return whole[:middle] if name.endswith(FIRST) else whole[middle:]
    if name == REFERENCE:
        return builtin()
    return library() if name == LIBRARY else from_file(name)


def split(text: Sequence[str]) -> tuple[list[str], list[str]]:
    """(what may be trained on, what only quality is measured on): the last eighth is held out."""
    cut = len(text) - len(text) // HELD_OUT
    return list(text[:cut]), list(text[cut:])


def from_text(text: str) -> list[str]:
    """Whole sentences of 20 to 400 characters, markup removed; headings, tables, grammars and code are left out."""
    sentences: dict[str, None] = {}
    for paragraph in _PARAGRAPH.split(text):
        line = _BULLET.sub("", " ".join(paragraph.split()))
        for sentence in _split(_plain(line)):
            if SHORTEST <= len(sentence) <= LONGEST and _readable(sentence):
                sentences.setdefault(sentence)
    return list(sentences)


def _plain(line: str) -> str:
    without_roles = _ROLE.sub(lambda m: m[1] or m[2], line)
    return _FOOTNOTE.sub("", _EMPHASIS.sub(r"\2", without_roles))


def _split(paragraph: str) -> list[str]:
    parts: list[str] = []
    for part in _END.split(paragraph):
        if parts and _ABBREVIATED.search(parts[-1]):
            parts[-1] += " " + part
        else:
            parts.append(part)
    return parts


def _readable(sentence: str) -> bool:
    balanced = sentence.count("(") == sentence.count(")") and sentence.count('"') % 2 == 0
    return balanced and sentence[0].isupper() and sentence[-1] in ".!?" and not _CODE.search(sentence)
