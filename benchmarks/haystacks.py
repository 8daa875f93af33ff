"""Two texts to hide things in, in halves: settings are chosen on the first half of each, and stated on the second.

The documentation that ships with Python, and the text of WikiText-2 where a path or the environment's
KVCOMPILE_WIKITEXT says where it lies; without it that text is left out, which is said.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from kvcompile.calibration.text import builtin, from_text

WIKITEXT, PRETRAINED = "KVCOMPILE_WIKITEXT", "model.pretrained="


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--half` and `--wikitext`."""
    parser.add_argument("--half", choices=["a", "b"], default="b", help="of each text, and with it the seed")
    parser.add_argument("--wikitext", default=os.environ.get(WIKITEXT), help="WikiText-2's test text")


def detokenized(text: str) -> str:
    """WikiText's text with its spaces as they are written: `1 @,@ 000 , and` is `1,000, and`."""
    text = re.sub(r" @(.)@ ", r"\1", text).replace(" n't", "n't").replace(" '", "'")
    return re.sub(r"([(\[]) ", r"\1", re.sub(r" ([.,;:!?)\]])", r"\1", text))


def haystacks(wikitext: str | None, half: str) -> dict[str, list[str]]:
    """Half of the sentences of each text: `a` the first ones, `b` the last."""
    texts = {"python": builtin()}
    if wikitext and Path(wikitext).is_file():
        lines = detokenized(Path(wikitext).read_text(encoding="utf-8")).replace("\n", "\n\n")
        texts["wikitext"] = [sentence for sentence in from_text(lines) if "<unk>" not in sentence]
    else:
        print(f"no wikitext: --wikitext or {WIKITEXT} names no file ({wikitext})", file=sys.stderr)
    return {name: s[: len(s) // 2] if half == "a" else s[len(s) // 2 :] for name, s in texts.items()}


@contextmanager
def files(texts: dict[str, list[str]]) -> Iterator[dict[str, str]]:
    """A file for each text, as `NeedleTask.source` takes it, while this is open."""
    with TemporaryDirectory() as folder:
        for name, sentences in texts.items():
            Path(folder, name).write_text("\n\n".join(sentences), encoding="utf-8")
        yield {name: str(Path(folder, name)) for name in texts}


def command() -> str:
    """The command line, without the folders of files that are not the project's."""
    words = list(sys.argv)
    for option in ("--wikitext", "--questions"):
        if option in words:
            words[words.index(option) + 1] = "FILE"
    words = [f"{PRETRAINED}FILE{Path(word).suffix}" if word.startswith(PRETRAINED) else word for word in words]
    return f"python {shlex.join(words)}"
