"""A compiled model as a folder: written whole or not at all, checked before it is read, and never executed."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompile import atomic
from kvcompile.artifact import kernel_texts, manifest, weights
from kvcompile.artifact.manifest import CONFIG, PLAN, RECIPE, Manifest, stamp
from kvcompile.errors import KvcompileError, first_line, wrapped_errors
from kvcompile.models.provenance import in_words, versions
from kvcompile.output import NO_ROOM
from kvcompile.paths import require_here, require_short, sync
from kvcompile.report import card

if TYPE_CHECKING:
    from kvcompile.plan.plan import Plan

__all__ = ["from_pretrained", "load", "push", "save", "versions"]

GRAPH = "graph.txt"
ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")
PLACES = ("auto", "balanced", "balanced_low_0", "sequential")  # what transformers calls "wherever it fits"


def save(model: Any, folder: str | Path, tokenizer: Any = None, extra: Callable[[Path], object] | None = None) -> Path:
    """Write a compiled model as an artifact: a folder that `kvcompile.load` opens.

    It is made beside `folder` and then put there in one step: an interrupt or a kill leaves what was there before.

    Args:
        model: a compiled model, whose recipe goes with it.
        folder: where to write. An artifact that is there is replaced as a whole.
        tokenizer: saved with the model. Files added to an artifact later are refused.
        extra: called with the folder before its manifest is made; may add files, such as the report.

    Returns:
        The folder, as an absolute path.

    Raises:
        KvcompileError: for a model that was not compiled from a recipe, for weights that would load differently, for a
            folder that holds something else than an artifact, and where writing fails.

    Examples:
        >>> model = kvcompile.compile(model, recipe="snapkv")
        >>> kvcompile.save(model, folder / "small", tokenizer).name
        'small'
    """
    weights.require_saveable(model)
    folder = place(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic.making(folder, ".saving-") as scratch:
            built = scratch / "artifact"
            built.mkdir()
            _write(model, built, tokenizer)
            if extra is not None:
                extra(built)
            manifest.write(built, model.kvcompile.plan.digest())
            _sync(built)
            atomic.publish(built, folder)
    except OSError as error:
        fix = weights.ROOM if error.errno in NO_ROOM else None
        raise KvcompileError(f"the artifact could not be written to {folder}", first_line(error), fix) from error
    model.config.kvcompile = stamp(model.kvcompile.plan, model.config)
    return folder


def load(
    path: str | Path,
    device: Any = None,
    dtype: Any = None,
    *,
    device_map: Any = None,
    torch_dtype: Any = None,
    **hub: Any,
) -> Any:
    """Open an artifact: the compiled model that was saved, with the same logits to the bit.

    Only data is read: no pickle, no code. A warning says where another version of kvcompile wrote the kernels' texts
    and they differ from those that run now.

    Args:
        path: the folder of an artifact, or its id on the Hugging Face hub, `"owner/name"`, from where it is fetched.
        device: where to put the model. None: the CPU, as in transformers.
        dtype: of the weights, as `"bfloat16"` or `torch.bfloat16`. None and `"auto"`: as saved.
        device_map: the same as `device`, in transformers' words: a device, or `"auto"` for the accelerator if there
            is one.
        torch_dtype: the same as `dtype`, in transformers' words.
        hub: `revision`, `token`, `cache_dir`, `local_files_only`, as huggingface_hub takes them.

    Returns:
        The compiled model in eval mode, still its transformers class.

    Raises:
        KvcompileError: for an artifact that is missing, truncated, altered, newer, or would compile differently by now.

    Examples:
        >>> model = kvcompile.compile(model, recipe="snapkv")
        >>> loaded = kvcompile.load(kvcompile.save(model, folder / "small"))
        >>> torch.equal(loaded(ids).logits, model(ids).logits)
        True
    """
    wanted, place = _dtype(torch_dtype if dtype is None else dtype), _device(device, device_map)
    return _opened(_local(path, hub), wanted, place)


def from_pretrained(path: str | Path, **options: Any) -> Any:
    """`kvcompile.load` under transformers' name: takes and returns the same.

    Examples:
        >>> path = kvcompile.save(kvcompile.compile(model, recipe="snapkv"), folder / "small")
        >>> kvcompile.from_pretrained(path, dtype="bfloat16").dtype
        torch.bfloat16
    """
    return load(path, **options)


def push(
    model: Any, repo_id: str, tokenizer: Any = None, private: bool | None = None, token: Any = None, **commit: Any
) -> str:
    """Save a compiled model as an artifact and upload it to the Hugging Face hub; return the address of the commit.

    commit: what `huggingface_hub.upload_folder` takes: `commit_message`, `revision`, `create_pr`, ...
    Raises KvcompileError as `save` does, and where the hub refuses.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as scratch:
        folder = save(model, Path(scratch, "artifact"), tokenizer)
        with wrapped_errors(
            f"the artifact could not be uploaded to {repo_id}", "hf auth login, with a right to write there"
        ):
            hub = HfApi(token=token)
            repo = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return str(hub.upload_folder(repo_id=repo, folder_path=folder, **commit))


def place(folder: str | Path) -> Path:
    """Where an artifact goes, absolute. Raises KvcompileError where something else is, or nothing can be written."""
    require_here()
    folder = Path(folder).expanduser().resolve()
    require_short(folder)
    if folder.exists() and not folder.is_dir():
        raise KvcompileError("an artifact is a folder", f"{folder}: a file", "save elsewhere")
    # a broken artifact may be replaced too, so its manifest is not read
    ours = all((folder / name).is_file() for name in (manifest.MANIFEST, RECIPE))
    if folder.is_dir() and any(folder.iterdir()) and not ours:
        raise KvcompileError("only an artifact is replaced by an artifact", f"{folder}: other files", "save elsewhere")
    above = next(parent for parent in folder.parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise KvcompileError("an artifact needs a folder that can be written to", above, "save elsewhere")
    return folder


def _write(model: Any, folder: Path, tokenizer: Any) -> None:
    compiled = model.kvcompile
    weights.write(model, folder, tokenizer)
    (folder / RECIPE).write_text(compiled.recipe, encoding="utf-8")
    (folder / PLAN).write_text(json.dumps(compiled.plan.to_json(), indent=2) + "\n", encoding="utf-8")
    (folder / GRAPH).write_text(_graph_text(model), encoding="utf-8")
    card.write(model, folder, card.ARTIFACT)
    (folder / kernel_texts.FOLDER).mkdir()
    for name, text in kernel_texts.of_model(model).items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def _opened(folder: Path, dtype: str | None, device: Any) -> Any:
    from kvcompile.build import build, plan_of
    from kvcompile.config.recipe import from_recipe, to_recipe
    from kvcompile.structure.pack import require_cpu

    facts = manifest.verify(folder)
    with wrapped_errors(f"{folder / RECIPE} must be a recipe", manifest.REMADE):
        config = from_recipe(manifest.read_text(folder / RECIPE))
    stored = weights.Stored(folder, facts)
    original = weights.original_config(folder, stored, config.model.architecture)
    with wrapped_errors(f"{folder / CONFIG} must fit {RECIPE}", manifest.REMADE):
        plan = plan_of(original, dtype or stored.dtype, config, config.policies())
    model = _placed(weights.read(folder, stored, original, plan, config.model.weights), device)
    if config.model.weights:
        require_cpu(model)
    model = build(model, plan, config.kernels, to_recipe(config))
    kernel_texts.verify(_as_saved(model.kvcompile.plan, folder, facts, converted=dtype is not None), folder, facts)
    model.config.kvcompile = stamp(model.kvcompile.plan, model.config)
    return model


def _graph_text(model: Any) -> str:
    from kvcompile.graph.wiring import wiring

    compiled = model.kvcompile
    lines = [f"The compiled graph of {type(model).__name__}. For reading only: nothing imports or executes this file."]
    lines += ["Passes:", *(f"  {name}: {count} places" for name, count in compiled.changes.items())]
    lines += ["Wiring, read off the edges:"]
    lines += [
        f"  layer {layer:>3} reads the KV of layer {owner:>3}" for layer, owner in wiring(compiled.graph.graph).items()
    ]
    return "".join(f"# {line}\n" for line in lines) + f"\n{compiled.graph.code.strip()}\n"


def _sync(folder: Path) -> None:
    """Have the disk hold everything before the rename makes it visible."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def _local(path: str | Path, hub: dict[str, Any]) -> Path:
    """The folder of an artifact; one on the hub is fetched, once its manifest shows that it is one."""
    folder = Path(path).expanduser()
    unknown = [name for name in hub if name not in ("revision", "token", "cache_dir", "local_files_only")]
    if unknown:
        raise KvcompileError(
            "an artifact is loaded with device, dtype, and where it lies on a hub", unknown[0], "leave it out"
        )
    if folder.exists() or not ON_HUB.fullmatch(str(path)):
        return folder
    from huggingface_hub import hf_hub_download, snapshot_download

    with wrapped_errors(f"{path} must be the folder of an artifact, or its id on the hub", manifest.OURS):
        hf_hub_download(str(path), manifest.MANIFEST, **hub)
        return Path(snapshot_download(str(path), **hub))


def _dtype(dtype: Any) -> str | None:
    if dtype is None or dtype == "auto":
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in weights.DTYPES:
        raise KvcompileError(f"dtype must be one of {', '.join(weights.DTYPES)}", dtype)
    return name


def _device(device: Any, device_map: Any) -> Any:
    """The one device of `device`, or of transformers' `device_map`; None: where the weights are read to."""
    if isinstance(device_map, dict):
        device_map = device_map[""] if set(device_map) == {""} else list(device_map.items())
    if device_map is None:
        return device
    if device is not None or isinstance(device_map, list):
        raise KvcompileError(
            "a compiled model lies on one device", f"device={device}, device_map={device_map}", "give device=<one>"
        )
    if device_map not in PLACES:
        return device_map
    import torch

    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def _placed(model: Any, device: Any) -> Any:
    if device is None:
        return model
    try:
        return model.to(device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise KvcompileError("device must be a device of this machine", f"{device}: {first_line(error)}") from error


def _as_saved(plan: Plan, folder: Path, facts: Manifest, converted: bool) -> Plan:
    """The plan in the dtype that was saved; it must be the plan that was saved."""
    with wrapped_errors(f"{folder / PLAN} must be a plan", manifest.REMADE):
        saved = dict(json.loads(manifest.read_text(folder / PLAN)))
        if converted:  # the dtype that the user asked for is not a difference
            plan = replace(plan, dtype=saved["dtype"])
    now = json.loads(json.dumps(plan.to_json()))
    if now == saved and plan.digest() == facts.plan:
        return plan
    where = next((key for key in now if now[key] != saved.get(key)), "digest")
    raise KvcompileError(
        f"{folder / PLAN}: the recipe must give the plan that was saved",
        f"another one ({where} differs); saved by {in_words(facts.versions)}, read by {in_words(versions())}",
        "use those versions, or compile again",
    )
