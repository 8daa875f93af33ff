"""Sweeps: every job leaves a result.json, whatever happens to it; afterwards one summary of all."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvcompile.errors import KvcompileError, QualityError, first_line
from kvcompile.models.provenance import versions
from kvcompile.output import room_to_write
from kvcompile.report.units import size

RESULT = "result.json"
Cell = float | int | str | None
Done = tuple[str | None, dict[str, Cell]]  # (output folder, summary row)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobResult:
    """One job of a sweep. `status` is running, ok or failed; `overrides` as on the command line.

    settings: digest of all that the job was told; the same job of a repeated sweep has the same.
    """

    job: int
    overrides: list[str]
    status: str
    error: str | None = None
    output: str | None = None
    summary: dict[str, Cell] = field(default_factory=dict)
    settings: str = ""


class SweepFolder(Callback):  # type: ignore[misc]
    """Remembers where this process's sweep puts its jobs: Hydra tells nobody else."""

    current: Path | None = None
    before: Mapping[Path, int] = MappingProxyType({})  # when each result was written that was there already

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note the folder and what lies in it, so that results of an earlier sweep are not counted."""
        SweepFolder.current = Path(config.hydra.sweep.dir).absolute()
        SweepFolder.before = written(SweepFolder.current)
        os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # to Ray, lines of two jobs that differ in numbers alone are one


def written(folder: Path) -> dict[Path, int]:
    """The results below a folder, and when each was written, in ns of the file system's clock."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob(RESULT)}


def digest(cfg: DictConfig) -> str:
    """What a job's composed settings, and the versions that it runs with, come to."""
    return hashlib.sha256(json.dumps([OmegaConf.to_yaml(cfg), versions()]).encode()).hexdigest()


def finished(folder: Path, settings: str) -> JobResult | None:
    """The result that a job of the same settings has left in its folder, if it went well and its output is there."""
    try:
        result = JobResult(**json.loads((folder / RESULT).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    same = result.status == "ok" and result.settings == settings != ""
    return result if same and result.output and Path(result.output).exists() else None


def run_job(folder: Path, job: int, overrides: Sequence[str], work: Callable[[], Done], settings: str = "") -> None:
    """Do `work`, which returns (output, summary), and write what came of it; an error is logged and recorded.

    settings: digest of them; a job that has been done with the same is not done again ("": it is).
    Raises OSError where that cannot be written: on a full device no job after it could be recorded either.
    """
    if finished(folder, settings):
        log.info("job %d is done already: %s; remove that to do it again", job, folder / RESULT)
        os.utime(folder / RESULT)  # so that it counts as a job of this sweep
        return
    started = JobResult(job, list(overrides), "running", settings=settings)
    _write(folder, started)
    try:
        with room_to_write():
            output, summary = work()
        result = replace(started, status="ok", output=output, summary=dict(summary))
    except KvcompileError as error:
        log.error("job %d: %s", job, error)
        result = replace(started, status="failed", error=str(error))
        if isinstance(error, QualityError):
            result = replace(result, output=error.output, summary=error.summary)
    except Exception as error:
        log.exception("job %d", job)
        result = replace(started, status="failed", error=f"{type(error).__name__}: {first_line(error)}")
    _write(folder, result)


def interrupted(error: Exception, folder: Path) -> KvcompileError:
    """The error about a launcher that gave up: jobs do not raise, but the process of one may die."""
    return KvcompileError(
        "every job of a sweep must come back to its launcher",
        f"{type(error).__name__}: {first_line(error)}",
        f"the same command with hydra.sweep.dir={folder}, which leaves out jobs that are done",
    )


def _write(folder: Path, result: JobResult) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f".{RESULT}"
    scratch.write_text(json.dumps(asdict(result), indent=2) + "\n")
    os.replace(scratch, folder / RESULT)


def collect(folder: Path, before: Mapping[Path, int] = MappingProxyType({})) -> list[JobResult]:
    """The results below `folder` but those of `before`, by job; a job whose process died counts as failed."""
    results = []
    for path, time in written(folder).items():
        if before.get(path) == time:
            continue
        result = JobResult(**json.loads(path.read_text()))
        if result.status == "running":
            result = JobResult(result.job, result.overrides, "failed", "the process ended before the job did")
        results.append(result)
    return sorted(results, key=lambda result: result.job)


def rows_of(results: Sequence[JobResult]) -> list[dict[str, Cell]]:
    """One flat row a job: its overrides by key, status, summary, output, error; all rows with the same columns."""
    rows = []
    for result in results:
        changes = dict(text.lstrip("+~").partition("=")[::2] for text in result.overrides)
        measured = {f"{key} (measured)" if key in changes else key: value for key, value in result.summary.items()}
        rows.append({"job": result.job, **changes, "status": result.status, **measured})
    columns = list(dict.fromkeys(key for row in rows for key in row))
    last = [{"output": result.output, "error": result.error} for result in results]
    return [{**{key: row.get(key) for key in columns}, **end} for row, end in zip(rows, last, strict=True)]


def write_summary(results: Sequence[JobResult], folder: Path) -> None:
    """summary.csv and summary.md in `folder`."""
    from tabulate import tabulate

    rows = rows_of(results)
    with (folder / "summary.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    filled = [key for key in rows[0] if any(row[key] is not None for row in rows)]
    cells = [[_text(row[key]) for key in filled] for row in rows]
    text = tabulate(cells, filled, tablefmt="github", disable_numparse=True)
    (folder / "summary.md").write_text(f"{text}\n", encoding="utf-8")


def summary_table(results: Sequence[JobResult]) -> Table:
    """What differs between the jobs, and what came of them.

    What all have in common stands in the title (overrides) and the caption (results); `x_before` and `x_after` share a
    column, bytes are in binary units and numbers have three digits: the files next to it hold them all.
    """
    rows = rows_of(results)
    shared = [t for t in results[0].overrides if len(results) > 1 and all(t in r.overrides for r in results)]
    hidden = {t.lstrip("+~").partition("=")[0] for t in shared} | {"output", "error"}
    cells = [_cells({key: value for key, value in row.items() if key not in hidden}) for row in rows]
    alike = {key: values.pop() for key in cells[0] if len(values := {c[key] for c in cells if c[key]}) == 1}
    alike = {key: value for key, value in alike.items() if sum(bool(c[key]) for c in cells) > 1}
    columns = [key for key in cells[0] if key not in alike and any(c[key] for c in cells)]
    drawn = Table(
        title=escape(" ".join(shared)) or None,
        title_justify="left",
        caption=escape(", ".join(f"{key} {value}" for key, value in alike.items())) or None,
        caption_justify="left",
    )
    for key in columns:
        justify: Literal["left", "right"] = "left" if isinstance(rows[0].get(key), str) else "right"
        drawn.add_column(escape(key), justify=justify, overflow="fold")
    for row, cell in zip(rows, cells, strict=True):
        drawn.add_row(*(escape(cell[key]) for key in columns), style="red" if row["status"] == "failed" else None)
    return drawn


def _cells(row: dict[str, Cell]) -> dict[str, str]:
    """One job's row for reading: headings that can be broken at spaces, `before > after` in one cell."""
    out = {}
    for key, value in row.items():
        name, _, when = key.rpartition("_")
        if when == "after" and f"{name}_before" in row:
            continue
        after = row.get(f"{name}_after") if when == "before" else None
        text = " > ".join(_short(key, v) for v in (value, after) if v is not None)
        out[(name if when == "before" else key).replace("_", " ")] = text
    return out


def _short(key: str, value: Cell) -> str:
    if isinstance(value, int) and "bytes" in key:
        return size(value)
    if isinstance(value, int) and "parameters" in key:
        return f"{value / 1e6:.4g}M"
    return f"{value:.3g}" if isinstance(value, float) else _text(value)


def _text(value: Cell) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"


def summarise(console: Console) -> tuple[int, int]:
    """Print and write the summary of this process's sweep, if there was one; return (jobs failed, jobs)."""
    folder = SweepFolder.current
    if folder is None:
        return 0, 0
    SweepFolder.current = None
    results = collect(folder, SweepFolder.before) if folder.is_dir() else []
    if not results:
        return 0, 0
    write_summary(results, folder)
    console.print(summary_table(results))
    failed = [result for result in results if result.status == "failed"]
    for result in failed:
        console.print(f"job {result.job}: {result.error}", style="red", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{folder}/summary.csv, summary.md", markup=False, highlight=False, soft_wrap=True)
    return len(failed), len(results)
