"""Running exporters on a compiled model: into its artifact while that is made, or into a folder of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompile import atomic
from kvcompile.errors import KvcompileError, first_line
from kvcompile.exporters.base import Exported, Exporter
from kvcompile.exporters.registry import build_exporters, require_open
from kvcompile.paths import require_here, require_short
from kvcompile.progress import Progress, no_foreign_bars, silent
from kvcompile.report import files

if TYPE_CHECKING:
    from kvcompile.report.report import Report

FOLDER = "export"  # of an artifact: export/<name>/


def export(model: Any, exporter: str, folder: str | Path, tokenizer: Any = None, **options: Any) -> Exported:
    """Write a compiled model in a form that others run without kvcompile.

    Args:
        model: a compiled model, or the folder of an artifact, whose tokenizer and report then go with it.
        exporter: its name, as `kvcompile ls` lists them: `hf`, `gguf`, `deepseek`, `torch`, `aoti`,
            `onnx`, `vllm`.
        folder: where to write, new or empty. It appears when it is complete; an interrupt leaves it as it was.
        tokenizer: goes into the folder with the model; some exporters need one.
        options: the exporter's own, as `export.<name>.<option>` on the command line.

    Returns:
        What was written: `exporter`, `files` (bytes by file) and `bytes` (of all).

    Raises:
        KvcompileError: for an unknown exporter or option, and for a model that this exporter cannot write exactly.

    Examples:
        >>> model = kvcompile.compile(model, recipe="gqa")
        >>> done = kvcompile.export(model, "hf", folder / "plain")
        >>> sorted(done.files)
        ['README.md', 'config.json', 'generation_config.json', 'model.safetensors']
    """
    (built,) = build_exporters({exporter: options})
    measured = None
    if isinstance(model, (str, Path)):
        model, kept, measured = opened(model)
        tokenizer = tokenizer or kept
    return write_new(built, model, tokenizer, folder, measured)


def opened(artifact: str | Path) -> tuple[Any, Any, Report | None]:
    """(model, tokenizer, report) of an artifact; None for what it was saved without."""
    from transformers import AutoTokenizer

    from kvcompile.artifact.artifact import load
    from kvcompile.artifact.weights import DATA_ONLY

    folder = Path(artifact).expanduser()
    with no_foreign_bars():
        model = load(folder)
    read = (folder / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder, **DATA_ONLY) if read else None
    return model, tokenizer, files.read(folder) if (folder / files.FILES[0]).is_file() else None


def write_new(
    exporter: Exporter,
    model: Any,
    tokenizer: Any,
    folder: str | Path,
    measured: Report | None = None,
    progress: Progress = silent,
) -> Exported:
    """Export a compiled model into a new folder, which appears when it is complete."""
    require_here()
    folder = Path(folder).expanduser().resolve()
    require_short(folder)
    _require_compiled(model)
    require_open([exporter], model.kvcompile.plan, model.config)
    exporter.refuse_tokenizer(tokenizer)
    _require_new(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic.making(folder, ".export-") as place:
            (done,) = write_into([exporter], model, tokenizer, place, measured, progress)
            atomic.publish(place / exporter.name, folder)
    except OSError as error:
        raise KvcompileError(f"export={exporter.name} could not be written to {folder}", first_line(error)) from error
    return done


def write_into(
    exporters: Sequence[Exporter],
    model: Any,
    tokenizer: Any,
    folder: Path,
    measured: Report | None = None,
    progress: Progress = silent,
) -> list[Exported]:
    """Run `exporters` on a compiled model, each into `folder/<name>/`, with a model card beside it."""
    from kvcompile.report import card

    done = []
    for exporter in exporters:
        progress(f"export {exporter.name}", 0, 0)
        place = folder / exporter.name
        place.mkdir(parents=True)
        exporter.write(model, tokenizer, place)
        card.write(model, place, exporter.usage, measured)
        files = {p.relative_to(place).as_posix(): p.stat().st_size for p in sorted(place.rglob("*")) if p.is_file()}
        done.append(Exported(exporter.name, files))
    return done


def _require_compiled(model: Any) -> None:
    if getattr(model, "kvcompile", None) is None:
        raise KvcompileError(
            "only a compiled model is exported",
            type(model).__name__,
            "kvcompile.compile(model, recipe=...) first; an ordinary model has save_pretrained",
        )


def _require_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise KvcompileError("an export goes into a new folder", f"{folder}: there is something", "choose another")
