"""A job of analyses: each is measured, written as JSON and as a picture, and has its section in one report."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompile.analysis.base import Analysis, Subject
from kvcompile.analysis.parts import Parts, fingerprint
from kvcompile.analysis.registry import build_analyses, discover
from kvcompile.errors import KvcompileError
from kvcompile.models.provenance import base_of, in_words, versions
from kvcompile.options import options_of
from kvcompile.paths import require_here, require_short
from kvcompile.progress import Progress

if TYPE_CHECKING:
    from kvcompile.config.schema import Config

REPORT, RECORD = "report.md", "record"
PATHS = ("/", "~", ".")  # what a value begins with that says where a file lies
DPI = 150


@dataclass(frozen=True)
class Finding:
    """One analysis as its JSON file holds it. settings: what it depends on, beside the machine."""

    analysis: str
    command: str
    settings: dict[str, Any]
    versions: dict[str, str]
    result: dict[str, Any]

    @property
    def of(self) -> Analysis:
        """The analysis, with its options."""
        return build_analyses({self.analysis: self.settings["options"]})[0]

    @property
    def numbers(self) -> dict[str, float | int | str | None]:
        """What the summary of a sweep shows of it."""
        return self.of.numbers(self.result)


def target(config: Config) -> Path:
    """Where analyses go, absolute. Raises KvcompileError where something else is, or nothing can be written."""
    require_here()
    folder = Path(str(config.output)).expanduser().resolve()
    require_short(folder)
    if folder.exists() and not folder.is_dir():
        raise KvcompileError("analyses are written into a folder", f"{folder}: a file", "output=<a folder>")
    ours = {REPORT, RECORD, *(f"{name}.{kind}" for name in discover() for kind in ("json", "png"))}
    others = [p.name for p in folder.iterdir() if p.name not in ours] if folder.is_dir() else []
    if others:
        raise KvcompileError("analyses are written beside nothing else", f"{folder}: {others[0]}", "output=<elsewhere>")
    above = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(above, os.W_OK):
        raise KvcompileError("analyses need a folder that can be written to", above, "output=<elsewhere>")
    return folder


def analyse(
    model: Any, tokenizer: Any, config: Config, progress: Progress, say: Callable[[str], None]
) -> list[Finding]:
    """Do the analyses of `config` in order and write each when it is done; what is measured already is not again.

    say: gets one line about each. Raises KvcompileError for what cannot be measured, before anything is.
    """
    folder = target(config)
    weights = fingerprint(model)
    jobs = []
    for analysis in config.analyses():
        settings = _settings(analysis, model, config)
        common = {**settings, "options": analysis.part_options(), "weights": weights, **versions()}
        parts = Parts(folder / RECORD / f"{analysis.name}.jsonl", common)
        subject = Subject(model, tokenizer, config, parts, progress)
        analysis.refuse(subject)
        jobs.append((analysis, subject, settings))
    (folder / RECORD).mkdir(parents=True, exist_ok=True)
    findings = []
    for analysis, subject, settings in jobs:
        result = analysis.measure(subject)
        finding = Finding(analysis.name, command(config), settings, versions(), result)
        _write(folder, analysis, finding)
        say(_told(analysis.name, subject.parts))
        findings.append(finding)
    _replace(folder / REPORT, report(folder).encode())
    return findings


def _settings(analysis: Analysis, model: Any, config: Config) -> dict[str, Any]:
    """What a result depends on: the model, the number format it ran in, the options. Prompts count by their tokens."""
    dtype = str(model.dtype).removeprefix("torch.")
    return {"model": _name(model, config), "dtype": dtype, "options": options_of([analysis])[analysis.name]}


def _name(model: Any, config: Config) -> str:
    """What the model is called; never where it lies."""
    pretrained = Path(str(config.model.pretrained))
    return pretrained.stem if pretrained.suffix == ".gguf" else base_of(model.config).name


def _told(name: str, parts: Parts) -> str:
    line = f"{name}: {parts.measured} parts measured"
    line += f", {parts.reused} taken from an earlier run" if parts.reused else ""
    return line + (f", {parts.aside} of other settings left aside" if parts.aside else "")


def command(config: Config) -> str:
    """A command line that gives these settings: what differs from the defaults; of paths, the last part alone."""
    from kvcompile.config.schema import ModelConfig, PromptsConfig

    words = [f"analysis=[{','.join(config.analysis)}]", f"model={config.model.name}"]
    defaults = {name: options_of([discover()[name]()])[name] for name in config.analysis}
    settings = [
        ("model", vars(config.model), {**vars(ModelConfig()), "name": config.model.name}),
        ("prompts", vars(config.prompts), vars(PromptsConfig())),
        *((f"analysis.{name}", options, defaults[name]) for name, options in config.analysis.items()),
    ]
    for where, values, default in settings:
        words += [shlex.quote(f"{where}.{key}={shown(v)}") for key, v in values.items() if v != default[key]]
    return "kvcompile " + " ".join(words)


def shown(value: Any) -> str:
    """A value as on the command line; of a path, the last part alone: where a file lies is nobody's business."""
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(shown, value))}]"
    if isinstance(value, str):
        text = Path(value).name if value.startswith(PATHS) else value
        return text if re.fullmatch(r"[\w./-]+", text) else '"{}"'.format(text.replace('"', '\\"'))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _write(folder: Path, analysis: Analysis, finding: Finding) -> None:
    from io import BytesIO

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure, picture = Figure(dpi=DPI, layout="constrained"), BytesIO()
    FigureCanvasAgg(figure)  # no global state, no window system
    analysis.draw(finding.result, figure)
    title = f"{finding.settings['model']}: {analysis.summary}"
    figure.suptitle(title.replace("$", r"\$"), x=0.01, ha="left", fontweight="bold")
    figure.savefig(picture, format="png")
    _replace(folder / f"{analysis.name}.png", picture.getvalue())
    _replace(folder / f"{analysis.name}.json", f"{_json(dataclasses.asdict(finding))}\n".encode())


def _json(data: object) -> str:
    """JSON with a line for each key and each list of numbers."""
    text = json.dumps(data, indent=1, ensure_ascii=False)
    return re.sub(r"\[[^][{}\"]+\]", lambda numbers: " ".join(numbers[0].split()), text)


def _replace(path: Path, content: bytes) -> None:
    """Write a file that is the old one or the new one, whenever the process is killed."""
    scratch = path.with_name(f".{path.name}")
    scratch.write_bytes(content)
    scratch.replace(path)


def report(folder: Path) -> str:
    """The report of a folder: a section of every analysis whose JSON lies in it, those of earlier runs too."""
    return "\n\n".join(["# Analysis", *(section(finding) for finding in findings(folder))]) + "\n"


def findings(folder: Path) -> Sequence[Finding]:
    """What lies in a folder. Raises KvcompileError for a file that is none of ours."""
    found = []
    for name in discover():
        path = folder / f"{name}.json"
        if path.exists():
            try:
                found.append(Finding(**json.loads(path.read_text("utf-8"))))
            except (OSError, ValueError, TypeError) as error:
                raise KvcompileError(
                    f"{path.name} must be an analysis of this version of kvcompile", error, f"remove {path}"
                ) from error
    return found


def section(finding: Finding) -> str:
    """One analysis in the report."""
    name, settings = finding.analysis, finding.settings
    facts = f"{settings['model']}, {settings['dtype']}; {in_words(finding.versions)}"
    parts = (
        f"## {name}",
        f"    {finding.command}",
        facts,
        f"![{name}]({name}.png)",
        finding.of.section(finding.result),
    )
    return "\n\n".join(parts)
