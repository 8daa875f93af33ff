"""What is measured already: parts of an analysis, kept one by one, so that a run that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

SAMPLED = 1024  # numbers of each weight that tell one model from another


class Parts:
    """A file of lines `{"key": ..., "value": ...}`; a key is a hash of everything that its value depends on.

    Settings that differ have other keys: nothing measured with them is ever mixed in, and it is found again when they
    come back.

    Attributes:
        reused: parts that an earlier run had measured.
        measured: parts that this one measured.
    """

    def __init__(self, path: Path, settings: object) -> None:
        """settings: what all parts depend on, as plain data."""
        self.path, self.settings = path, settings
        self.reused = self.measured = 0
        self._values: dict[str, Any] = dict(_lines(path))

    @property
    def aside(self) -> int:
        """How many parts of other settings the file holds."""
        return len(self._values) - self.reused - self.measured

    def __contains__(self, unit: object) -> bool:
        """Whether a part is measured already."""
        return digest([self.settings, unit]) in self._values

    def refresh(self) -> None:
        """Find what other processes have measured meanwhile."""
        self._values = _values(_text(self.path)) | self._values

    def of(self, unit: object, compute: Callable[[], Any]) -> Any:
        """The value of one part: as the file has it, or computed now and written there at once."""
        key = digest([self.settings, unit])
        if key in self._values:
            self.reused += 1
            return self._values[key]
        text = json.dumps({"key": key, "value": compute()})
        self._append(text)
        self.measured += 1
        self._values[key] = json.loads(text)["value"]  # the same whether it was measured now or before
        return self._values[key]

    def _append(self, line: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
            file.flush()
            os.fsync(file.fileno())


def _lines(path: Path) -> dict[str, Any]:
    """What the file holds; the last line may be torn where a run was killed, and is ended then."""
    text = _text(path)
    if text and not text.endswith("\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
    return _values(text)


def _text(path: Path) -> str:
    return path.read_text("utf-8", errors="replace") if path.exists() else ""


def _values(text: str) -> dict[str, Any]:
    """Of every line that is whole."""
    values: dict[str, Any] = {}
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            values[entry["key"]] = entry["value"]
        except (ValueError, KeyError, TypeError):
            continue
    return values


def digest(data: object) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def fingerprint(model: nn.Module) -> str:
    """A hash of some numbers of every weight: other weights have another, wherever they were loaded from."""
    import torch

    found = hashlib.sha256()
    for name, weight in model.state_dict().items():
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLED)].contiguous().cpu().view(torch.uint8)
        found.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        found.update(sample.numpy().tobytes())
    return found.hexdigest()
