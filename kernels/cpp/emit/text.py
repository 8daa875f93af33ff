"""C++ text from templates: `$name` stands for a text; alone on its line, for a block that takes the line's indent."""

from __future__ import annotations

import re
from textwrap import dedent, indent

BLOCK = re.compile(r"^( *)\$(\w+)\n", re.M)
NAME = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def fill(template: str, **texts: object) -> str:
    """The template with every `$name` (or `${name}`) replaced; a block that is empty leaves no line behind."""

    def block(match: re.Match[str]) -> str:
        text = str(texts[match[2]]).rstrip("\n")
        return indent(text, match[1]) + "\n" if text else ""

    flush = dedent(template.lstrip("\n")).rstrip(" ")
    return NAME.sub(lambda match: str(texts[match[1] or match[2]]), BLOCK.sub(block, flush))
