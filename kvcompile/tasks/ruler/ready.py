"""Ready prompts of RULER: the files that its own code writes, one JSON object with `input` and `outputs` a line."""

from __future__ import annotations

import re
from pathlib import Path

from kvcompile.analysis.files import rows_of
from kvcompile.errors import KvcompileError
from kvcompile.tasks.prompt import Prompt
from kvcompile.tasks.ruler.wording import WORDINGS, Draft


def read(path: str, samples: int) -> list[Draft]:
    """The first `samples` prompts of a file, parted where the question begins.

    Raises KvcompileError for a file that cannot be read, has fewer, or holds something else than RULER's prompts.
    """
    rows = rows_of(Path(path).expanduser(), "tasks.ruler.source")
    if len(rows) < samples:
        raise KvcompileError(
            f"tasks.ruler: samples must be at most the rows of {Path(path).name}", samples, f"{len(rows)} or less"
        )
    return [
        _parted(f"{row.get('input', '')}{row.get('answer_prefix', '')}", row.get("outputs"), f"{path}, row {i}")
        for i, row in enumerate(rows[:samples], 1)
    ]


def name(path: str, names: tuple[str, ...]) -> str:
    """The task that a path names, in its file or its folders; the name of the file where it names none."""
    named = [name for name in names if re.search(rf"(?<![a-z0-9]){name}(?![a-z0-9])", path)]
    return named[-1] if named else Path(path).stem


def _parted(text: str, answers: object, where: str) -> Draft:
    if not isinstance(answers, list) or not answers:
        raise KvcompileError(f"tasks.ruler: {where} must hold input and outputs, a list of answers")
    for wording in WORDINGS:
        question, start = (part.partition("{")[0] for part in (wording.question, wording.start))
        border = text.rfind(question)
        if border > 0:
            begun = text.find(start, border)
            begun = len(text) if begun < 0 else begun
            prompt = Prompt(text[:border], text[border:begun], text[begun:])
            return Draft(prompt, tuple(map(str, answers)), wording)
    raise KvcompileError(f"tasks.ruler: {where} must hold one of RULER's questions", repr(text[-120:]))
