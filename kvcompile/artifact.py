"""A compiled model as a folder: written whole or not at all, checked before it is read, and never executed."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompile import atomic, card, manifest, sources
from kvcompile.errors import KvcompileError
from kvcompile.folders import require_here, require_short, sync
from kvcompile.manifest import CONFIG, PLAN, RECIPE, Manifest, in_words, stamp, versions
from kvcompile.progress import no_foreign_bars
from kvcompile.stack import first_line

if TYPE_CHECKING:
    from kvcompile.plan import Plan

__all__ = ["from_pretrained", "load", "save", "versions"]

GRAPH = "graph.txt"
TOLD = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError)
SAVEABLE = "mend what it says of model.config or model.generation_config, or make room on the disk"
HEADS = "num_key_value_heads"
DATA_ONLY = {"local_files_only": True, "trust_remote_code": False}
DTYPES = ("float32", "float16", "bfloat16", "float64")


def save(model: Any, folder: str | Path, tokenizer: Any = None, extra: Callable[[Path], object] | None = None) -> Path:
    """Write a compiled model as an artifact; return its folder.

    It is made in a folder beside `folder` and then put there in one step: an interrupt or a kill leaves what was there
    before. An artifact that was there is replaced as a whole. `extra` may add files (the report) before the manifest is
    made.
    Raises KvcompileError for a model that was not compiled from a recipe, for weights that would load differently, for
    a folder that holds something else than an artifact, and where writing fails.
    """
    _require_saveable(model)
    folder = place(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic.making(folder, ".saving-") as scratch:
            made = scratch / "artifact"
            made.mkdir()
            _write(model, made, tokenizer)
            if extra is not None:
                extra(made)
            manifest.write(made, model.kvcompile.plan.digest())
            _sync(made)
            atomic.publish(made, folder)
    except OSError as error:
        raise KvcompileError(f"the artifact could not be written to {folder}", first_line(error)) from error
    model.config.kvcompile = stamp(model.kvcompile.plan, model.config)
    return folder


def load(path: str | Path, device: Any = None, dtype: Any = None) -> Any:
    """The compiled model that an artifact holds, in eval mode: the same class, the same logits to the bit.

    device: where to put it (default: the CPU, as in transformers). dtype: `"bfloat16"`, `torch.bfloat16`, ... (default:
    as saved). Data only is read: no pickle, no code, no `_target_`.
    Warns where another version of kvcompile wrote the texts of the kernels, and they differ from those that run.
    Raises KvcompileError for artifacts that are missing, truncated, altered, newer, or compile differently by now.
    """
    from kvcompile.compiler import build, plan_of
    from kvcompile.config import from_recipe, to_recipe

    folder = Path(path).expanduser()
    facts = manifest.verify(folder)
    wanted = _dtype(dtype)
    with _told(f"{folder / RECIPE} must be a recipe"):
        config = from_recipe((folder / RECIPE).read_text(encoding="utf-8"))
    original = _original(folder)
    policies = config.policies()
    model = _placed(_weights(folder, wanted, original, plan_of(original, "float32", config, policies)), device)
    plan = plan_of(original, str(model.dtype).removeprefix("torch."), config, policies)
    model = build(model, plan, config.kernels, to_recipe(config), converted=True)
    sources.verify(_as_saved(model.kvcompile.plan, folder, facts, converted=wanted is not None), folder, facts)
    model.config.kvcompile = stamp(model.kvcompile.plan, model.config)
    return model


def from_pretrained(path: str | Path, device: Any = None, dtype: Any = None) -> Any:
    """`load` under the name that users of transformers expect."""
    return load(path, device, dtype)


def _require_saveable(model: Any) -> None:
    compiled = getattr(model, "kvcompile", None)
    if compiled is None or not compiled.recipe:
        raise KvcompileError(
            "an artifact holds a model compiled from a recipe",
            type(model).__name__,
            "kvcompile.compile(model, recipe=...) first; an ordinary model has save_pretrained",
        )
    kinds = {str(p.dtype) for p in model.parameters() if p.is_floating_point()}
    if len(kinds) > 1:
        raise KvcompileError("all weights must have one dtype to load as saved", ", ".join(sorted(kinds)))
    kept = set(model.state_dict())
    for name, buffer in model.named_buffers():
        # rebuilt at load, in float32: what `.to(bfloat16)` rounded away would come back and change the logits
        if name not in kept and name.endswith("inv_freq") and str(buffer.dtype) != "torch.float32":
            raise KvcompileError(
                f"{name} must be float32 to load as saved",
                buffer.dtype,
                "give from_pretrained the dtype instead of casting the model afterwards",
            )


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


def write_checkpoint(model: Any, folder: Path, tokenizer: Any = None) -> None:
    """What transformers saves of a compiled model: config, generation config, weights, and its tokenizer."""
    with _borrowed_config(model), _told("transformers must be able to save the model", SAVEABLE):
        model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _write(model: Any, folder: Path, tokenizer: Any) -> None:
    compiled = model.kvcompile
    write_checkpoint(model, folder, tokenizer)
    (folder / RECIPE).write_text(compiled.recipe, encoding="utf-8")
    (folder / PLAN).write_text(json.dumps(compiled.plan.to_json(), indent=2) + "\n", encoding="utf-8")
    (folder / GRAPH).write_text(_graph_text(model), encoding="utf-8")
    card.write(model, folder, card.ARTIFACT)
    (folder / sources.FOLDER).mkdir()
    for name, text in sources.of_model(model).items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def _borrowed_config(model: Any) -> Iterator[None]:
    """Let transformers write into a copy of the config: it sets dtype and architectures when it saves."""
    original = model.config
    model.config = copy.deepcopy(original)
    model.config.kvcompile = stamp(model.kvcompile.plan, model.config)
    try:
        with no_foreign_bars():
            yield
    finally:
        model.config = original


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


@contextmanager
def _told(rule: object, fix: str = manifest.REMADE) -> Iterator[None]:
    """Turn what goes wrong inside into one line that begins with `rule`."""
    from safetensors import SafetensorError

    try:
        yield
    except KvcompileError as error:
        raise KvcompileError(f"{rule}: {error.rule}", error.got, error.fix or fix) from error
    except (SafetensorError, *TOLD) as error:
        raise KvcompileError(str(rule), f"{type(error).__name__}: {first_line(error)}", fix) from error


def _dtype(dtype: Any) -> str | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise KvcompileError(f"dtype must be one of {', '.join(DTYPES)}", dtype)
    return name


def _original(folder: Path) -> Any:
    """The config of the model before its weights were converted: what the recipe was for."""
    from transformers import AutoConfig

    from kvcompile.adapters.registry import architecture_of

    with _told(f"{folder / CONFIG} must describe a known model"):
        config = AutoConfig.from_pretrained(folder, **DATA_ONLY)
        architecture_of(config)
        heads = (getattr(config, "kvcompile", None) or {}).get("original", {}).get(HEADS)
        if heads is not None:
            if not isinstance(heads, int) or heads < 1 or config.num_attention_heads % heads:
                raise KvcompileError(f"kvcompile.original.{HEADS} must divide the query heads", repr(heads))
            setattr(config, HEADS, heads)
    return config


def _weights(folder: Path, dtype: str | None, original: Any, plan: Plan) -> Any:
    """The uncompiled model, its modules shaped by the plan before the weights arrive.

    Attention is `eager` because ours replaces it: no name in the config can fetch a kernel.
    """
    from transformers import AutoModelForCausalLM

    from kvcompile.structure.convert import reshape

    cls = AutoModelForCausalLM._model_mapping[type(original)]

    def init(self: Any, config: Any) -> None:
        cls.__init__(self, config)
        reshape(self, plan)

    shaped: Any = type(cls.__name__, (cls,), {"__init__": init, "__module__": cls.__module__})
    with _told(f"{folder} must hold the weights of its config"):
        model, info = shaped.from_pretrained(
            folder,
            config=original,
            dtype=dtype or "auto",
            use_safetensors=True,
            attn_implementation="eager",
            output_loading_info=True,
            **DATA_ONLY,
        )
        wrong = sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]))
        if wrong:
            raise KvcompileError(
                "weights must be those of the config, none missing, none left over", f"{len(wrong)}, first {wrong[0]}"
            )
    model.__class__ = cls
    return model.eval()


def _placed(model: Any, device: Any) -> Any:
    if device is None:
        return model
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise KvcompileError("device must be a device of this machine", f"{device}: {first_line(error)}") from error


def _as_saved(plan: Plan, folder: Path, facts: Manifest, converted: bool) -> Plan:
    """The plan in the dtype that was saved; it must be the plan that was saved."""
    with _told(f"{folder / PLAN} must be a plan"):
        saved = dict(json.loads((folder / PLAN).read_text(encoding="utf-8")))
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
