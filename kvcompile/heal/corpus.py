"""Texts to train on and to measure on: the offline text, or whatever `datasets` can read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kvcompile.calibration.text import HELD_OUT, sentences, split
from kvcompile.errors import KvcompileError, first_line
from kvcompile.heal.optional import needed

if TYPE_CHECKING:
    from kvcompile.config.schema import Config, HealConfig

KINDS = {".json": "json", ".jsonl": "json", ".txt": "text", ".csv": "csv", ".parquet": "parquet"}
OFFLINE = "the offline text"


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, and others that are held out. `joint` stands between two documents."""

    name: str
    train: Iterable[str]
    held_out: Iterable[str]
    joint: str

    def ids(self, tokenizer: Any, held_out: bool, enough: int | None = None) -> Tensor:
        """Token ids `[n]` of one of the two parts, of its first documents that have `enough` if that is given."""
        ids: list[int] = []
        texts = self.held_out if held_out else self.train
        if enough is None or self.joint == " ":  # sentences of one text are no documents
            return torch.tensor(tokenizer(self.joint.join(texts))["input_ids"], dtype=torch.long, device="cpu")
        for text in texts:
            ids += tokenizer(text + self.joint)["input_ids"]
            if len(ids) >= enough:
                break
        return torch.tensor(ids, dtype=torch.long, device="cpu")


def corpus(heal: HealConfig, tokenizer: Any) -> Corpus:
    """The text that `heal.dataset` names, its last eighth held out.

    Raises KvcompileError for one that cannot be read, has no such column, or is too short to hold anything out.
    """
    if heal.dataset is None:
        train, held_out = split(sentences())
        return Corpus(OFFLINE, train, held_out, " ")
    rows = _read(heal)
    names = list(rows.column_names)
    if heal.column not in names:
        raise KvcompileError(
            "heal.column must be a column of the dataset", repr(heal.column), f"one of {', '.join(names)}"
        )
    if len(rows) < 2:
        raise KvcompileError("a dataset must have rows to train on and rows to hold out", f"{len(rows)} rows")
    cut = len(rows) - max(1, len(rows) // HELD_OUT)
    train = rows.select(range(cut)).shuffle(seed=heal.seed)
    rest = rows.select(range(cut, len(rows)))
    return Corpus(heal.dataset, _texts(train, heal.column), _texts(rest, heal.column), tokenizer.eos_token or "\n")


class Blocks(Dataset[dict[str, Tensor]]):
    """`count` sequences of `length` tokens: the text cut into blocks, in another order and at other places each time.

    What number `i` is depends on the seed alone, so that a resumed training sees what it would have seen.
    pads: a sequence leaves 0..pads places of a block transformer's first block empty, as its `padding` says; 0: there
    is none.
    Raises KvcompileError if the text is too short for one block.
    """

    def __init__(self, ids: Tensor, length: int, count: int, seed: int, pads: int = 0) -> None:
        if len(ids) < 2 * length:
            raise KvcompileError(
                "the text must be longer than two sequences", f"{len(ids)} tokens", "a smaller heal.length"
            )
        self.ids, self.length, self.count, self.seed, self.pads = ids, length, count, seed, pads
        self.each = len(ids) // length - 1  # blocks in one round through the text, whatever the first one's place

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        turn, place = divmod(index, self.each)
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
        offset = int(torch.randint(self.length, (1,), generator=draw, dtype=torch.int64, device="cpu"))
        block = int(torch.randperm(self.each, generator=draw, dtype=torch.int64, device="cpu")[place])
        start = offset + block * self.length
        sequence = {"input_ids": self.ids[start : start + self.length]}
        if self.pads:
            number = torch.randint(self.pads + 1, (self.each,), generator=draw, dtype=torch.int64, device="cpu")
            sequence["padding"] = number[place]
        return sequence


class Windows(Dataset[dict[str, Tensor]]):
    """Held-out windows `[n, width]` of which the last `tokens` tokens are scored."""

    def __init__(self, rows: Tensor, tokens: int) -> None:
        self.rows, self.tokens = rows, tokens

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        labels = row.clone()
        labels[: -self.tokens] = -100
        return {"input_ids": row, "labels": labels}


def _texts(rows: Any, column: str) -> Iterator[str]:
    """The rows that have a text. Raises KvcompileError for a column of something else."""
    for row in rows:
        text = row[column]
        if text is not None and not isinstance(text, str):
            raise KvcompileError("heal.column must hold text", f"{column!r} with a {type(text).__name__}")
        if text is not None:
            yield text


def _read(heal: HealConfig) -> Any:
    datasets = needed("datasets", "a dataset")
    datasets.disable_progress_bars()
    name = str(heal.dataset)
    path = Path(name).expanduser()
    if not path.exists() and (path.suffix in KINDS or path.is_absolute() or name.count("/") > 1):
        raise KvcompileError("heal.dataset must be a file, a folder or a hub name", f"{name}: no such path")
    try:
        if path.is_file():
            if path.suffix not in KINDS:
                raise KvcompileError(
                    "a dataset file must be " + ", ".join(KINDS), name, "another format, a folder or a hub name"
                )
            return datasets.load_dataset(KINDS[path.suffix], data_files=str(path), split="train")
        if path.is_dir() and (path / "state.json").is_file():
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset(str(path) if path.is_dir() else name, heal.subset, split=heal.split)
    except KvcompileError:
        raise
    except Exception as error:  # every loader has its own
        raise KvcompileError(
            f"heal.dataset={name} could not be read",
            f"{type(error).__name__}: {first_line(error)}",
            "a file (json, jsonl, txt, csv, parquet), a folder or a hub name with heal.subset and heal.split",
        ) from error


def held_out(config: Config, tokenizer: Any) -> Tensor:
    """Token ids `[n]`: a file of the user's, else what is held out of the text that is trained on, offline or not.

    Raises KvcompileError for a text that cannot be read.
    """
    wanted, heal = config.perplexity, config.heal
    if wanted.source is None and heal.tokens and heal.dataset:
        return corpus(heal, tokenizer).ids(tokenizer, True, wanted.windows * (wanted.context + wanted.tokens + 1))
    text = sentences(wanted.source) if wanted.source else split(sentences())[1]
    return torch.as_tensor(
        tokenizer(" ".join(text), return_tensors="pt")["input_ids"], dtype=torch.int64, device="cpu"
    )[0]
