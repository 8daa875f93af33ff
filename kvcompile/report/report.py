"""The proof that a compile ends with: what each layer and head holds, and what that did to quality and speed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompile.errors import BUG, KvcompileError
from kvcompile.evaluation.needle import NeedleRecord, NeedleResult
from kvcompile.evaluation.speed import Comparison, Speed
from kvcompile.heal.record import HealRecord

if TYPE_CHECKING:
    from rich.console import Console

FILES = ("report.json", "report.md", "report.png")


@dataclass(frozen=True)
class LayerRow:
    """One layer after the measured prompt: tokens kept by each KV head, bytes held, and what the plan said.

    planned: tokens per head, None where the split over heads or layers depends on the input; planned_bytes: what the
    planned (else the kept) tokens take.
    dense_bytes: what the uncompressed layer would hold. threshold: no budget, the scores alone decide.
    host_bytes: of `bytes`, what was found in host memory; offloaded: the plan says that all of it lies there.
    owner: the layer whose cache it reads, None where it has its own.
    """

    layer: int
    kv_heads: int
    kept: list[int]
    planned: list[int] | None
    bytes: int
    planned_bytes: int
    dense_bytes: int
    threshold: bool = False
    host_bytes: int = 0
    offloaded: bool = False
    owner: int | None = None


@dataclass(frozen=True)
class Report:
    """Everything measured in one compile, as plain data.

    tokens: length of the prompt after which the layers were measured. planned_total: tokens planned for all layers
    whose split depends on the input. needle, perplexity, parameters: (uncompressed, compiled). speed: the first is
    uncompressed, the last compiled. kernels, passes: what runs in which layer, how often each pass rewrote the graph.
    exports: bytes by door and file.
    """

    title: str
    model: str
    recipe: str
    policies: list[str]
    tokens: int
    rows: list[LayerRow]
    planned_total: int | None = None
    machine: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    kernels: list[str] = field(default_factory=list)
    passes: dict[str, int] = field(default_factory=dict)
    needle: tuple[NeedleResult, NeedleResult] | None = None
    speed: Comparison | None = None
    perplexity: tuple[float, float] | None = None
    parameters: tuple[int, int] | None = None
    healed: HealRecord | None = None
    exports: dict[str, dict[str, int]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def bytes_held(self) -> int:
        """Bytes of keys and values measured in the live cache."""
        return sum(row.bytes for row in self.rows)

    @property
    def host_bytes(self) -> int:
        """What of these was found in host memory."""
        return sum(row.host_bytes for row in self.rows)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the uncompressed cache."""
        return sum(row.dense_bytes for row in self.rows)

    @property
    def per_token(self) -> tuple[int, int]:
        """Bytes of cache a prompt token, over all layers, on average: (uncompressed, compiled)."""
        return round(self.dense_bytes / max(1, self.tokens)), round(self.bytes_held / max(1, self.tokens))

    def to_json(self) -> dict[str, Any]:
        """Plain dict: the fields, and their `summary`."""
        return {**dataclasses.asdict(self), "summary": summary(self)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Report:
        """The report that `to_json` wrote. Raises KvcompileError for anything else."""
        try:
            given = {name: value for name, value in data.items() if name != "summary"}
            given["rows"] = [LayerRow(**row) for row in given["rows"]]
            if given["needle"] is not None:
                given["needle"] = tuple(
                    NeedleResult(tuple(NeedleRecord(**r) for r in n["records"])) for n in given["needle"]
                )
            if given["speed"] is not None:
                speeds = {name: Speed(**speed) for name, speed in given["speed"]["speeds"].items()}
                given["speed"] = Comparison(**{**given["speed"], "speeds": speeds})
            for pair in ("perplexity", "parameters"):
                if given[pair] is not None:
                    given[pair] = tuple(given[pair])
            if given["healed"] is not None:
                given["healed"] = HealRecord.from_json(given["healed"])
            return Report(**given)
        except (AttributeError, KeyError, TypeError) as error:
            raise KvcompileError(
                "the file must be a report of this version of kvcompile", f"{type(error).__name__}: {error}"
            ) from error


def verify(rows: Sequence[LayerRow], planned_total: int | None = None) -> None:
    """Compare live cache and plan. Raises KvcompileError naming the layer and head where they differ.

    planned_total: tokens that the layers without a plan of their own must hold together, over all their heads;
    layers with a threshold are left out of that sum.
    """
    for row in rows:
        where = f"layer {row.layer}"
        _equal(f"{where} must hold its KV heads", len(row.kept), row.kv_heads)
        if row.planned is not None:
            _equal(f"{where} must have a plan for its KV heads", len(row.planned), row.kv_heads)
            for head, (kept, planned) in enumerate(zip(row.kept, row.planned, strict=True)):
                _equal(f"{where}, head {head} must hold the planned tokens", kept, planned)
        _equal(f"{where} must hold the planned bytes", row.bytes, row.planned_bytes)
        away = row.bytes if row.offloaded else 0
        _equal(f"{where} must hold in host memory the bytes that are offloaded", row.host_bytes, away)
        if row.bytes > row.dense_bytes:
            raise KvcompileError(
                f"{where} must not hold more than uncompressed", f"{row.bytes} > {row.dense_bytes} bytes"
            )
    if planned_total is not None:
        free = [row for row in rows if row.planned is None and not row.threshold]
        names = ", ".join(str(row.layer) for row in free)
        _equal(f"layers {names} together must hold the planned tokens", sum(sum(r.kept) for r in free), planned_total)


def summary(report: Report) -> dict[str, float | int | str | None]:
    """The numbers that a summary of many compiles shows; None where not measured."""
    needle, perplexity = report.needle or (None, None), report.perplexity or (None, None)
    parameters = report.parameters or (None, None)
    speeds = list(report.speed.speeds.values()) if report.speed else [None]
    before, after = speeds[0], speeds[-1]
    return {
        "tokens": report.tokens,
        "bytes": report.bytes_held,
        "dense_bytes": report.dense_bytes,
        "host_bytes": report.host_bytes,
        "kept": report.bytes_held / report.dense_bytes if report.dense_bytes else None,
        "bytes_per_token_before": report.per_token[0],
        "bytes_per_token_after": report.per_token[1],
        "parameters_before": parameters[0],
        "parameters_after": parameters[1],
        "needle_before": needle[0].mean if needle[0] else None,
        "needle_after": needle[1].mean if needle[1] else None,
        "perplexity_before": perplexity[0],
        "perplexity_after": perplexity[1],
        "perplexity_converted": report.healed.perplexity[1] if report.healed else None,
        "prefill_s_before": before.prefill_s if before else None,
        "prefill_s_after": after.prefill_s if after else None,
        "decode_tokens_s_before": before.decode_tokens_s if before else None,
        "decode_tokens_s_after": after.decode_tokens_s if after else None,
    }


def write(report: Report, folder: str | Path) -> list[Path]:
    """Write report.json, report.md and report.png into `folder`, which must exist; returns their paths."""
    from kvcompile.report.plot import draw
    from kvcompile.report.tables import markdown

    paths = [Path(folder) / name for name in FILES]
    paths[0].write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    paths[1].write_text(markdown(report), encoding="utf-8")
    draw(report, paths[2])
    return paths


def read(folder: str | Path) -> Report:
    """The report in `folder`. Raises KvcompileError if there is none or it is damaged."""
    path = Path(folder) / FILES[0]
    try:
        return Report.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise KvcompileError(f"{path.name} must be a readable report", str(error)) from error


def show(report: Report, console: Console | None = None) -> None:
    """Print the whole report: losses of quality or speed in red, savings in green."""
    from rich.console import Console

    from kvcompile.report.tables import show as show_tables

    show_tables(report, console or Console())


def _equal(rule: str, held: int, planned: int) -> None:
    if held != planned:
        raise KvcompileError(f"measured cache and plan disagree: {rule}", f"{held} where {planned} was planned", BUG)
