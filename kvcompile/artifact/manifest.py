"""The manifest of an artifact: what every file in it must be, who made it, and the check of both."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from kvcompile.errors import KvcompileError, wrapped_errors
from kvcompile.models.forks import KEY, compiled_as
from kvcompile.models.provenance import base_of, versions
from kvcompile.paths import sha256
from kvcompile.report.card import CARD

if TYPE_CHECKING:
    from kvcompile.plan.plan import Plan

FORMAT = 2
TEXT_BYTES = 16 << 20  # most that a text in an artifact may have: reading it must end
MANIFEST, CONFIG, RECIPE, PLAN = "manifest.json", "config.json", "recipe.yaml", "plan.json"
REQUIRED = (CONFIG, RECIPE, PLAN)
OURS = "give the folder that kvcompile wrote"
REMADE = "compile again, or copy the whole folder again from where it was made"


@dataclass(frozen=True)
class Fact:
    """What one file must be."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`files` by path relative to the folder; `plan` is the plan's digest; `versions` of the packages that made it."""

    format: int
    versions: dict[str, str]
    created: str
    plan: str
    files: dict[str, Fact]


def stamp(plan: Plan, config: Any) -> dict[str, Any]:
    """What a compiled model's `config.kvcompile` says, and so its `config.json`: version, policies, plan, base model.

    `original`: what the config said before the conversion, where the weights were converted. `architecture`: the type
    that it was compiled as, where that is not its own.
    """
    named = compiled_as(config)
    facts: dict[str, Any] = {
        "version": versions()["kvcompile"],
        "policies": [a.name for a in plan.applied],
        "plan": plan.digest(),
        "base": asdict(base_of(config)),
    }
    if named != config.model_type:
        facts[KEY] = named
    if plan.layers and plan.layers[0].heads:
        facts["original"] = {"num_key_value_heads": plan.layers[0].dense_heads}
    return facts


def write(folder: Path, plan: str) -> None:
    """Write the manifest of everything that lies in `folder` now but its cards, for people edit them."""
    facts = {p: Fact(p.stat().st_size, sha256(p)) for p in _files(folder) if p.name != CARD}
    files = {p.relative_to(folder).as_posix(): fact for p, fact in facts.items()}
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    manifest = Manifest(FORMAT, versions(), created, plan, files)
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")


def verify(folder: Path) -> Manifest:
    """The manifest of the artifact in `folder`, once every file has been found to be what it says.

    Raises KvcompileError, naming the file and the fix: no folder, no artifact, a newer format, a broken manifest, or a
    file that is missing, truncated, altered, or unlisted (but for the card and hidden files): transformers would read
    a tokenizer from it.
    """
    manifest = read(folder)
    for name, fact in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise KvcompileError("an artifact must hold every file of its manifest", f"{path}: missing", REMADE)
        size = path.stat().st_size
        if size != fact.bytes:
            raise KvcompileError(f"{path} must have {fact.bytes} bytes", f"{size}: truncated or altered", REMADE)
    names = (p.relative_to(folder).as_posix() for p in _files(folder) if p.name != CARD)
    unlisted = [name for name in names if name not in manifest.files and not name.startswith(".")]
    if unlisted:
        raise KvcompileError(
            f"{folder}: an artifact holds no file that its manifest does not list",
            ", ".join(unlisted),
            f"move {'it' if len(unlisted) == 1 else 'them'} away; a tokenizer is saved with its model, in one call: "
            f"kvcompile.save(model, {str(folder)!r}, tokenizer)",
        )
    for name, fact in manifest.files.items():
        if sha256(folder / name) != fact.sha256:
            raise KvcompileError(f"{folder / name} must be as it was saved", "other content of the same size", REMADE)
    return manifest


def read(folder: Path) -> Manifest:
    """The manifest alone, its files unchecked. Raises KvcompileError as `verify` does."""
    if not folder.is_dir():
        raise KvcompileError(
            "an artifact is a folder", f"{folder}: {'a file' if folder.exists() else 'no such folder'}", OURS
        )
    path = folder / MANIFEST
    if not path.is_file():
        raise _no_manifest(folder)
    try:
        data = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise KvcompileError(f"{path} must be JSON", error, REMADE) from error
    if not isinstance(data, dict) or type(data.get("format")) is not int:
        raise KvcompileError("the manifest of an artifact has a format number", f"{path} without", OURS)
    if data["format"] != FORMAT:
        raise KvcompileError(
            f"{path}: this kvcompile reads artifacts of format {FORMAT}",
            f"format {data['format']}, made by kvcompile {_maker(data)}",
            "upgrade kvcompile" if data["format"] > FORMAT else "compile again",
        )
    with wrapped_errors(f"{path} must be a manifest of format {FORMAT}", REMADE):
        return _parse(data)


def read_text(path: Path) -> str:
    """A text of an artifact. Raises ValueError for one that is longer than any that kvcompile writes."""
    size = path.stat().st_size
    if size > TEXT_BYTES:
        raise ValueError(f"{size:,} bytes, more than the {TEXT_BYTES:,} that are read")
    return path.read_text(encoding="utf-8")


def _parse(data: dict[str, Any]) -> Manifest:
    files = {str(name): Fact(int(fact["bytes"]), str(fact["sha256"])) for name, fact in data["files"].items()}
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise ValueError(f"{name!r} leads out of the folder")
        if not name.isprintable() or len(name) > 255:
            raise ValueError(f"{name!r} is no name of a file")
    for name in REQUIRED:
        if name not in files:
            raise ValueError(f"{name} is not listed")
    if not any(name.endswith(".safetensors") for name in files):
        raise ValueError("no weights are listed")
    if not re.fullmatch("[0-9a-f]{64}", data["plan"]):
        raise ValueError("the plan's digest is no SHA-256")
    versions = {str(name): str(number) for name, number in data["versions"].items()}
    return Manifest(int(data["format"]), versions, str(data["created"]), data["plan"], files)


def _maker(data: dict[str, Any]) -> str:
    versions = data.get("versions")
    return str(versions.get("kvcompile", "unknown")) if isinstance(versions, dict) else "unknown"


def _no_manifest(folder: Path) -> KvcompileError:
    try:
        config = json.loads(read_text(folder / CONFIG))
    except (OSError, ValueError, RecursionError):
        return KvcompileError("an artifact has a manifest.json", f"{folder}: none", OURS)
    if isinstance(config, dict) and "kvcompile" in config:
        return KvcompileError(
            "an artifact has a manifest.json",
            f"{folder}: weights of a compiled model without it, as export=[hf] writes them",
            "AutoModelForCausalLM.from_pretrained(folder) opens an export, kvcompile.load what kvcompile.save wrote",
        )
    return KvcompileError(
        "an artifact has a manifest.json",
        f"{folder}: a checkpoint that was never compiled",
        f"kvcompile recipe=<name> model.pretrained={folder}",
    )


def _files(folder: Path) -> Iterator[Path]:
    """Every file below `folder` but the manifest, in a fixed order."""
    yield from (p for p in sorted(folder.rglob("*")) if p.is_file() and p != folder / MANIFEST)
