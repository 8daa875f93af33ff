"""mkdocs hooks: pages may link to files of the repository as `../path`; the site takes those files in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parent.parent
TAKEN = "repository"  # the folder of the site in which files from outside docs/ lie
LINK = re.compile(r"(?<=\]\()\.\./([\w./-]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add every file that a page links to as `../path`, if it is text or a picture of this repository."""
    texts = [page.content_string for page in files.documentation_pages()]
    for path in sorted({found for text in texts for found in LINK.findall(text)}):
        if (ROOT / path).is_file():
            place = {"abs_src_path": str(ROOT / path), "inclusion": InclusionLevel.NOT_IN_NAV}
            files.append(File.generated(config, f"{TAKEN}/{path}", **place))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with its links to `../path` led to where the site holds that file."""
    if page.file.src_uri.startswith(f"{TAKEN}/"):
        return re.sub(r"(?<=\]\()docs/", "../", markdown)  # a file at the root links down into docs/
    return LINK.sub(rf"{TAKEN}/\1", markdown)
