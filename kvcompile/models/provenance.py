"""Where a model comes from: the base model's name, its place on a hub, its licence."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

UNKNOWN = "unknown"
LICENCES = {  # of the checkpoints that the model groups name, by their identifiers on the hub
    "HuggingFaceTB/SmolLM2-135M-Instruct": "apache-2.0",
    "HuggingFaceTB/SmolLM3-3B": "apache-2.0",
    "EleutherAI/pythia-160m": "apache-2.0",
    "Qwen/Qwen2.5-0.5B-Instruct": "apache-2.0",
    "Qwen/Qwen3-0.6B": "apache-2.0",
    "allenai/OLMo-2-0425-1B-Instruct": "apache-2.0",
    "google/gemma-2-2b-it": "gemma",
    "google/gemma-3-1b-it": "gemma",
    "ibm-granite/granite-3.3-2b-instruct": "apache-2.0",
    "microsoft/Phi-3-mini-4k-instruct": "mit",
    "mistralai/Mistral-7B-Instruct-v0.3": "apache-2.0",
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "apache-2.0",
}
DEFAULT = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Base:
    """The model that was compiled. hub: its id there; commit: which version; licence: as the hub names it.

    name is never a path: where a model lay on the disk of whoever compiled it is nobody's business.
    """

    name: str
    hub: str | None = None
    commit: str | None = None
    licence: str = UNKNOWN


def base_of(config: Any) -> Base:
    """The base model of a transformers config: as its `kvcompile` stamp says, else by where it was loaded from."""
    said = (getattr(config, "kvcompile", None) or {}).get("base")
    if isinstance(said, dict):
        return Base(**{key: said[key] for key in ("name", "hub", "commit", "licence") if key in said})
    source = str(getattr(config, "_name_or_path", "") or "")
    folder = Path(source)
    if not source:
        return Base(f"a {config.model_type} model", licence=_named(config) or UNKNOWN)
    if not folder.exists():
        hub = source if source.count("/") == 1 else None
        return Base(source.rpartition("/")[2], hub, getattr(config, "_commit_hash", None), _licence(config, hub))
    if _is_default(folder):
        return Base(DEFAULT.rpartition("/")[2], DEFAULT, None, LICENCES[DEFAULT])
    card = _front_matter(folder / "README.md")
    hub = card.get("base_model") if isinstance(card.get("base_model"), str) else None
    licence = card.get("license") if isinstance(card.get("license"), str) else None
    return Base(folder.resolve().name, hub, None, licence or _licence(config, hub))


def _licence(config: Any, hub: str | None) -> str:
    return _named(config) or LICENCES.get(hub or "", UNKNOWN)


def _named(config: Any) -> str | None:
    said = getattr(config, "license", None)
    return said if isinstance(said, str) else None


def _is_default(folder: Path) -> bool:
    from kvcompile.models.default import MANIFEST, WHEEL

    try:
        return bool(json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("source") == WHEEL)
    except (OSError, ValueError, AttributeError):
        return False


def _front_matter(path: Path) -> dict[str, Any]:
    """The YAML block that a model card begins with; empty where there is none."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        facts = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else None
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return {}
    return facts if isinstance(facts, dict) else {}


def versions() -> dict[str, str]:
    """The packages that decide what a compiled model computes."""
    return {name: version(name) for name in ("kvcompile", "torch", "transformers")}


def in_words(versions: dict[str, str]) -> str:
    """`kvcompile 0.1.0, torch 2.13.0`."""
    return ", ".join(f"{name} {number}" for name, number in versions.items())
