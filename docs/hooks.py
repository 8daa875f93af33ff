"""mkdocs hooks: pages link as on a code host, and tables of what policies can be told are made when the site is built.

A page may link to any file of the repository by its relative path; the site takes those files in, under `repository/`.
`<!-- options: name -->` in a page becomes the table of the fields of that policy.
"""

from __future__ import annotations

import dataclasses
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from kvcompile.stack import discover

ROOT = Path(__file__).resolve().parent.parent
TAKEN = "repository"  # the folder of the site in which files from outside docs/ lie
LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([\w./-]+)")  # no URL, no bare anchor
OPTIONS = re.compile(r"^<!-- options: (\w+) -->$", re.M)


def on_files(files: Any, config: Any) -> Any:
    """Add every file outside docs/ that a page links to, and what those link to in turn."""
    from mkdocs.structure.files import File, InclusionLevel

    waiting = [(f"docs/{page.src_uri}", page.content_string) for page in files.documentation_pages()]
    known: set[str] = set()
    while waiting:
        page, text = waiting.pop()
        for path in {target(page, link) for link in LINK.findall(text)} - known:
            if path.startswith("docs/") or not (ROOT / path).is_file():
                continue
            known.add(path)
            place: dict[str, Any] = {"abs_src_path": str(ROOT / path), "inclusion": InclusionLevel.NOT_IN_NAV}
            files.append(File.generated(config, site(path), **place))
            if path.endswith(".md"):
                waiting.append((path, (ROOT / path).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with links led to where the site holds a file, and with tables of options."""
    uri = page.file.src_uri
    path = uri.removeprefix(f"{TAKEN}/") if uri.startswith(f"{TAKEN}/") else f"docs/{uri}"

    def led(link: re.Match[str]) -> str:
        return posixpath.relpath(site(target(path, link[1])), posixpath.dirname(uri))

    return OPTIONS.sub(lambda found: options(found[1]), LINK.sub(led, markdown))


def target(page: str, link: str) -> str:
    """The path in the repository that a link on the page at `page` means."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def site(path: str) -> str:
    """Where the site holds a file of the repository."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{TAKEN}/{path}"


def options(policy: str) -> str:
    """A table of the fields of a policy: name, default, and what the docstrings of its classes say about it."""
    cls = discover()[policy]
    fields = dataclasses.fields(cls)
    said: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        said |= described(base.__dict__.get("__doc__") or "", [f.name for f in fields])
    rows = [f"| `{f.name}` | `{default(f)}` | {said.get(f.name, '')} |" for f in fields]
    return "\n".join([f"Options, as `stack.{policy}.<option>`:\n", "| option | default | |", "|---|---|---|", *rows])


def described(docstring: str, names: list[str]) -> dict[str, str]:
    """What a docstring says about fields: `name: text.` or `one, other: text.`, up to the next such name."""
    name = rf"(?:{'|'.join(names)})"
    start = re.compile(rf"(?:^|(?<=[.;)]) ){name}(?:, {name})*: ", re.M)
    said: dict[str, str] = {}
    for paragraph in re.split(r"\n\s*\n", re.sub(r"(?m)^ +", "", docstring)):
        flat = re.sub(rf"\n(?!{name}(?:, {name})*: )", " ", paragraph.strip())
        starts = list(start.finditer(flat))
        for place, here in enumerate(starts):
            end = starts[place + 1].start() if here is not starts[-1] else len(flat)
            text = flat[here.end() : end].strip().replace("|", r"\|")
            said |= dict.fromkeys(here[0].strip().removesuffix(":").split(", "), text)
    return said


def default(f: dataclasses.Field[Any]) -> str:
    """The default of a field as a recipe writes it."""
    value = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    return json.dumps(value).strip('"')
