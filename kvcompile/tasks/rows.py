"""Rows: what was measured, one JSON file for a stack, a model, a task, a setting of the question and a shard."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kvcompile.errors import KvcompileError

FORMAT = 1
SUFFIX = ".row.json"


@dataclass(frozen=True)
class Size:
    """What a cache takes after a prompt, in bytes.

    Attributes:
        tokens: of the prompt.
        held: keys, values, scales and indices. dense: of the uncompressed cache.
        held16, dense16: the same in a model that runs in bfloat16.
        positions: of the true positions of the entries, which are in none of the others.
    """

    tokens: int
    held: int
    held16: int
    positions: int
    dense: int
    dense16: int


@dataclass(frozen=True)
class Record:
    """One answer, or one text read.

    Attributes:
        sample, part: as the task calls them.
        turn: number of the turn within its sample; None: a text was read, and `nll` is measured.
        size: of the cache that was made.
        said: the answer. score: how right it is, 0 to 1. nll: of the text, nats a token.
    """

    sample: str
    part: str
    turn: int | None
    size: Size
    said: str | None = None
    score: float | None = None
    nll: float | None = None

    @staticmethod
    def from_json(data: dict[str, Any]) -> Record:
        """Raises KeyError and TypeError for anything but a record."""
        return Record(**{**data, "size": Size(**data["size"])})


@dataclass(frozen=True)
class Row:
    """All records of one stack, model, task, setting of the question and shard.

    Attributes:
        key: hash of the resolved settings that the row depends on; names its file.
        stack: how the stack is called, `dense` for none. policies: names and options, in order.
        command: a command line that measures it again.
        model: name of the model. weights: hash of some of its numbers. dtype: in which it ran.
        task, options, metric, exact: as the task says.
        question: `seen` or `hidden`. shard: (number, of how many).
        seconds: that it took. versions: of the packages that decide.
    """

    key: str
    stack: str
    policies: dict[str, dict[str, Any]]
    command: str
    model: str
    weights: str
    dtype: str
    task: str
    options: dict[str, Any]
    metric: str
    exact: bool
    question: str
    shard: tuple[int, int]
    records: tuple[Record, ...]
    seconds: float
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain data, what `from_json` reads."""
        return {"format": FORMAT, **asdict(self), "shard": list(self.shard)}

    @staticmethod
    def from_json(data: Any) -> Row:
        """Raises KvcompileError for anything but a row of this format."""
        try:
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r}")
            values = {f.name: data[f.name] for f in fields(Row)}
            values["records"] = tuple(Record.from_json(record) for record in data["records"])
            values["shard"] = tuple(data["shard"])
            return Row(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise KvcompileError("a row must be one of this version of kvcompile", f"{error!r}") from error


def key_of(settings: object) -> str:
    """What names a row: SHA-256 of the resolved settings, as plain data, that it depends on."""
    text = json.dumps([FORMAT, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def path_of(folder: Path, key: str) -> Path:
    """Where the row of a key lies."""
    return folder / f"{key}{SUFFIX}"


def write(folder: Path, row: Row) -> Path:
    """Write a row at once: it is there whole or not at all, whoever writes beside. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(folder, row.key)
    scratch = folder / f".{row.key}.{os.getpid()}"
    scratch.write_text(json.dumps(row.to_json(), ensure_ascii=False) + "\n", encoding="utf-8")
    scratch.replace(path)
    return path


def read(path: Path) -> Row:
    """One row. Raises KvcompileError for a file that is none."""
    try:
        return Row.from_json(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise KvcompileError(f"{path.name} must be a row of an evaluation", error, f"remove {path}") from error


def found(folders: Iterable[Path]) -> Iterator[Row]:
    """All rows below some folders, each key once, in the order of their files' names."""
    seen: set[str] = set()
    for folder in folders:
        for path in sorted(folder.rglob(f"*{SUFFIX}")):
            row = read(path)
            if row.key not in seen:
                seen.add(row.key)
                yield row


@dataclass(frozen=True)
class Cell:
    """Rows that differ by their shard alone, pooled: one stack on one model, asked one task in one setting."""

    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        """One of them, for what they have in common."""
        return self.rows[0]

    @property
    def records(self) -> list[Record]:
        """Those of all shards."""
        return [record for row in self.rows for record in row.records]

    @property
    def complete(self) -> bool:
        """Whether every shard is there."""
        return {row.shard[0] for row in self.rows} == set(range(self.first.shard[1]))


def cells(rows: Iterable[Row]) -> list[Cell]:
    """Rows pooled over shards, in the order in which each first came."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        same = [row.stack, row.policies, row.model, row.weights, row.dtype, row.task, row.options, row.question]
        groups.setdefault(key_of([*same, row.shard[1]]), []).append(row)
    return [Cell(tuple(sorted(group, key=lambda r: r.shard))) for group in groups.values()]


def sharded(samples: Sequence[Any], shard: tuple[int, int]) -> list[Any]:
    """Every n-th sample, from the k-th: shard (k, n)."""
    number, count = shard
    return list(samples[number::count])
