"""Text of kernels to loaded modules: fragments are copied in, files lie in the user's cache under their hash."""

from __future__ import annotations

import ast
import hashlib
import os
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path
from types import ModuleType

from kvcompile.paths import make_private, ours, private_folder

FRAGMENTS = Path(__file__).with_name("fragments.py")
_lock = threading.Lock()
_modules: dict[str, ModuleType] = {}


@cache
def _fragments(path: Path = FRAGMENTS) -> dict[str, tuple[str, frozenset[str]]]:
    """Source of each function and constant by name, in their order, and the names that it uses."""
    text = path.read_text("utf-8")
    lines = text.splitlines()
    fragments = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            first, name = node.decorator_list[0].lineno, node.name
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            first, name = node.lineno, node.targets[0].id
        else:
            continue
        names = frozenset(n.id for n in ast.walk(node) if isinstance(n, ast.Name)) - {name}
        fragments[name] = "\n".join(lines[first - 1 : node.end_lineno]), names
    return fragments


def _needed(names: set[str], library: dict[str, tuple[str, frozenset[str]]]) -> list[str]:
    """These names and all that they lead to, in the order of the library."""
    open_, needed = list(names), set()
    while open_:
        name = open_.pop()
        if name in library and name not in needed:
            needed.add(name)
            open_ += library[name][1]
    return [name for name in library if name in needed]


def assemble(title: str, constants: dict[str, object], functions: list[str], uses: list[str]) -> str:
    """One file that stands alone: title, imports, the fragments that `functions` (and `uses`) name, functions."""
    library = _fragments()
    body = "\n".join(functions)
    names = {n.id for n in ast.walk(ast.parse(body)) if isinstance(n, ast.Name)}
    copied = _needed(names | set(uses), library)
    numbers = [library[n][0] for n in copied if not library[n][0].startswith("@")]
    numbers += [f"{name} = tl.constexpr({value!r})" for name, value in constants.items() if name in names]
    jits = [f"\n\n{library[n][0]}\n" for n in copied if library[n][0].startswith("@")]
    head = f'"""{title}\n"""\n\nimport triton\nimport triton.language as tl\n\n'
    return head + "\n".join(numbers) + "\n" + "".join(jits) + "".join(functions)


def digest(text: str) -> str:
    """What a text is filed under."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def written(text: str, name: str) -> Path:
    """The file with this text in the user's cache folder; several processes may write it at once."""
    folder = private_folder("triton")
    path = folder / f"{name}_{digest(text)}.py"
    if not path.is_file() or not ours(path) or path.read_text("utf-8") != text:
        make_private(folder)
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(temporary, path)  # readers see the old file or the whole new one
        except BaseException:
            os.unlink(temporary)
            raise
    return path


def load(text: str, name: str = "kernels") -> ModuleType:
    """The module of a text. Triton reads the source of a kernel from its file, so the text must lie in a real one.

    What runs is the text given here, never one that was found on disk.
    """
    key = digest(text)
    with _lock:
        if key not in _modules:
            path = written(text, name)
            module = ModuleType(f"kvcompile_triton_{key}")
            module.__file__ = str(path)
            sys.modules[module.__name__] = module
            exec(compile(text, str(path), "exec"), module.__dict__)
            _modules[key] = module
        return _modules[key]
