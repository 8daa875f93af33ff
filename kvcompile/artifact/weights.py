"""The checkpoint inside an artifact: what can be saved, how it is marked as ours, how it is read back.

transformers alone must not open it, for it would run another model than the one that was saved: the uncompressed one,
or one with random layers. So `config.json` names a type of model that only kvcompile knows, and the weights lie in a
file that transformers does not look for.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompile.artifact.manifest import CONFIG, REMADE, Manifest, read_text, stamp
from kvcompile.errors import KvcompileError, wrapped_errors
from kvcompile.models.forks import name_as
from kvcompile.output import room_to_write
from kvcompile.progress import no_foreign_bars

if TYPE_CHECKING:
    from kvcompile.plan.plan import Plan

DATA_ONLY = {"local_files_only": True, "trust_remote_code": False}
DTYPES = ("float32", "float16", "bfloat16", "float64")
MODEL_TYPE = "kvcompile (open with kvcompile.load)"  # shown by transformers to whoever opens the folder with it
ARCHITECTURE = "KvcompileArtifact"
VARIANT = "kvcompile"  # the weights lie in model.kvcompile.safetensors
GENERATION_CONFIG = "generation_config.json"
HEADS = "num_key_value_heads"
SAFETENSORS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
CODES = {"U8", "I16"}  # of weights in few bits
RUNTIME = ("quantization_config", "fusion_config", "distributed_config")  # with these transformers builds another model
SAVEABLE = "mend what it says of model.config or model.generation_config"
REGISTERED = "import what registers them: AutoConfig.register(...) and AutoModelForCausalLM.register(...)"
ROOM = "make room, or save elsewhere"


def require_plain(model: Any) -> None:
    """Raise KvcompileError for weights that are not plain tensors of one floating dtype, such as quantised ones.

    Those that `model.weights` rounded are ours, and may be.
    """
    from torch import Tensor
    from torch.nn import Parameter

    from kvcompile.structure.pack import packed_names

    kinds, codes = set(), set(packed_names(model))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in codes:
            continue
        dtype = str(tensor.dtype).removeprefix("torch.")
        if type(tensor) not in (Parameter, Tensor) or dtype not in DTYPES:
            raise KvcompileError(
                "an artifact holds plain floating-point weights",
                f"{name}: {type(tensor).__name__} of {dtype}",
                "load the model unquantised, and quantise what kvcompile.load gives",
            )
        kinds.add(dtype)
    if len(kinds) > 1:
        raise KvcompileError("all weights must have one dtype to load as saved", ", ".join(sorted(kinds)))


def require_saveable(model: Any) -> None:
    """Raise KvcompileError where `load` would refuse, or would give another model than this one."""
    compiled = getattr(model, "kvcompile", None)
    if compiled is None or not compiled.recipe:
        raise KvcompileError(
            "an artifact holds a model compiled from a recipe",
            type(model).__name__,
            "kvcompile.compile(model, recipe=...) first; an ordinary model has save_pretrained",
        )
    from kvcompile.structure.pack import packed_as

    if model.config.get_text_config() is not model.config:
        raise KvcompileError(
            "an artifact holds a model of text", type(model).__name__, "compile it again where it is loaded"
        )
    require_plain(model)
    require_finite(model)
    kept = model.state_dict()
    for name, buffer in model.named_buffers():
        # rebuilt at load, in float32: what `.to(bfloat16)` rounded away would come back and change the logits
        if name not in kept and name.endswith("inv_freq") and str(buffer.dtype) != "torch.float32":
            raise KvcompileError(
                f"{name} must be float32 to load as saved",
                buffer.dtype,
                "give from_pretrained the dtype instead of casting the model afterwards",
            )
    config = copy.deepcopy(model.config)
    if compiled.plan.layers[0].heads:
        setattr(config, HEADS, compiled.plan.layers[0].dense_heads)
    shaped = skeleton(config, compiled.plan, packed_as(model))
    expected = {name: list(t.shape) for name, t in shaped.state_dict().items()}
    got = {name: list(t.shape) for name, t in kept.items()}
    wrong = [name for name in {**expected, **got} if expected.get(name) != got.get(name)]
    if wrong:
        raise KvcompileError(
            f"the weights must be those of a {type(model).__name__}",
            f"{wrong[0]}: {got.get(wrong[0], 'missing')} where {expected.get(wrong[0], 'nothing')} belongs"
            f" ({len(wrong)} in all)",
            "merge adapters, and save the model as it was compiled",
        )


def require_finite(model: Any) -> None:
    """Raise KvcompileError for a weight or buffer with NaN or infinity in it: every logit would be NaN."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise KvcompileError("weights must be finite", f"{name}: NaN or infinity in it", "use other weights")


def write_checkpoint(model: Any, folder: Path, tokenizer: Any = None) -> None:
    """What transformers saves of a compiled model, for transformers: config, generation config, weights, tokenizer."""
    _write_checkpoint(model, folder, tokenizer, None)


def write(model: Any, folder: Path, tokenizer: Any = None) -> None:
    """The same for an artifact: marked, so that transformers alone refuses it."""
    _write_checkpoint(model, folder, tokenizer, VARIANT)
    path = folder / CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    original = {"model_type": config["model_type"], "architectures": config["architectures"]}
    config["kvcompile"]["original"] = original | config["kvcompile"].get("original", {})
    config["kvcompile"]["model_type"] = ""  # AutoTokenizer, which needs none, warns of a type that it does not know
    config |= {"model_type": MODEL_TYPE, "architectures": [ARCHITECTURE]}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_checkpoint(model: Any, folder: Path, tokenizer: Any, variant: str | None) -> None:
    from transformers import PreTrainedModel

    from kvcompile.adapters.center import without_centers

    with (
        _borrowed_config(model),
        wrapped_errors("transformers must be able to save the model", SAVEABLE),
        room_to_write(ROOM),
    ):
        state = model.state_dict() if variant else without_centers(model.state_dict())
        PreTrainedModel.save_pretrained(model, folder, variant=variant, state_dict=state)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


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


def _number(data: dict[str, Any]) -> Any:
    """What transformers writes for a number that JSON has no word for: `{"__float__": "Infinity"}`."""
    return float(data["__float__"]) if set(data) == {"__float__"} else data


def original_config(folder: Path, stored: Stored, compiled_as: str | None = None) -> Any:
    """The config of the model before its weights were converted: what the recipe was for.

    compiled_as: the type whose architecture it was compiled by (None: its own).
    Raises KvcompileError, naming the file, for anything else than an artifact's config of a known architecture.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from kvcompile.adapters.architectures import architecture, architecture_of

    path = folder / CONFIG
    with wrapped_errors(f"{path} must describe a known model", REMADE):
        data = json.loads(read_text(path), object_hook=_number)
        if data["model_type"] != MODEL_TYPE:
            raise KvcompileError("the model_type of an artifact says who opens it", repr(data["model_type"]))
        foreign = next((name for name in RUNTIME if data.get(name) is not None), None)
        if foreign:
            raise KvcompileError("an artifact holds plain weights", foreign)
        said = data["kvcompile"]["original"]
        named = {key: said[key] for key in ("model_type", "architectures")}
        architecture(compiled_as or named["model_type"])  # another package's makes its config known to transformers
        if named["model_type"] not in CONFIG_MAPPING:
            raise KvcompileError(
                "transformers must know the model's own classes", repr(named["model_type"]), REGISTERED
            )
        known = CONFIG_MAPPING[named["model_type"]]
        count = known.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        others = ("num_layers", "layers_block_type")  # some configs count decoder layers, or only list their types
        layers = data[next(name for name in (count, *others) if name in data)]
        layers = len(layers) if isinstance(layers, list) else layers
        if type(layers) is not int or not 1 <= layers <= stored.tensors:
            raise KvcompileError(f"{count} must be in 1 to {stored.tensors}, the tensors stored", layers)
        # attention is `eager` because ours replaces it: no name in the config can fetch a kernel
        config = known.from_dict({**data, **named}, attn_implementation="eager")
        name_as(config, compiled_as)
        architecture_of(config)
        heads = said.get(HEADS)
        if heads is not None:
            if type(heads) is not int or heads < 1 or config.num_attention_heads % heads:
                raise KvcompileError(f"kvcompile.original.{HEADS} must divide the query heads", repr(heads))
            setattr(config, HEADS, heads)
    return config


def skeleton(config: Any, plan: Plan, packed: str | None = None) -> Any:
    """The uncompiled model without weights (on the meta device), its modules shaped by the plan.

    packed: what linear layers are rounded to (None: they are floats).
    """
    import torch

    with torch.device("meta"):
        return _shaped(config, plan, packed)(copy.deepcopy(config))  # a conversion edits the config


def _shaped(config: Any, plan: Plan, packed: str | None) -> Any:
    """The class of the uncompiled model, whose modules are shaped by the plan before the weights arrive."""
    from transformers import AutoModelForCausalLM

    from kvcompile.structure.convert import reshape
    from kvcompile.structure.pack import hollow_weights

    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise KvcompileError("transformers must know the model's own classes", repr(config.model_type), REGISTERED)
    cls = AutoModelForCausalLM._model_mapping[type(config)]

    def init(self: Any, config: Any) -> None:
        cls.__init__(self, config)
        reshape(self, plan)
        if packed:
            hollow_weights(self, packed)

    return type(cls.__name__, (cls,), {"__init__": init, "__module__": cls.__module__})


class Stored:
    """The weights that an artifact holds, their values unread: `dtype`, and how many tensors and numbers."""

    def __init__(self, folder: Path, facts: Manifest) -> None:
        """Read the headers. Raises KvcompileError for files that are no safetensors, or not of one floating dtype."""
        from safetensors import safe_open

        self.files = [folder / name for name in facts.files if "/" not in name and name.endswith(".safetensors")]
        self.tensors = self.numbers = 0
        kinds = set()
        with wrapped_errors(f"{folder} must hold the weights of its config", REMADE):
            for path in self.files:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 (no mapping)
                        piece = file.get_slice(name)
                        kinds.add(piece.get_dtype())
                        self.tensors += 1
                        self.numbers += math.prod(piece.get_shape())
            kinds -= CODES
            if len(kinds) != 1 or not kinds <= set(SAFETENSORS):
                raise KvcompileError("all must have one floating dtype", ", ".join(sorted(kinds)) or "no weights")
        self.dtype = SAFETENSORS[kinds.pop()]

    def read(self) -> dict[str, Any]:
        """All tensors by name, mapped from the files."""
        from safetensors.torch import load_file

        return {name: tensor for path in self.files for name, tensor in load_file(path).items()}


def read(folder: Path, stored: Stored, config: Any, plan: Plan, packed: str | None = None) -> Any:
    """The uncompiled model with its weights, in the dtype of the plan. transformers opens no file of the folder here.

    packed: what linear layers were rounded to (None: they are floats).
    Raises KvcompileError where the weights are not those of the config and the plan.
    """
    from transformers import GenerationConfig

    with wrapped_errors(f"{folder} must hold the weights of its config", REMADE):
        wanted = _numbers(skeleton(config, plan, packed))
        if stored.numbers != wanted:  # nothing is allocated for a config that asks for more than there is
            raise KvcompileError(f"it asks for {wanted:,} numbers", f"{stored.numbers:,}")
        model, info = _shaped(config, plan, packed).from_pretrained(
            None,
            config=config,
            state_dict=stored.read(),
            dtype=plan.dtype,
            attn_implementation="eager",
            ignore_mismatched_sizes=True,  # named below
            output_loading_info=True,
            **DATA_ONLY,
        )
        wrong = sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]))
        if wrong:
            raise KvcompileError(
                "weights must be those of the config, none missing, none left over", f"{len(wrong)}, first {wrong[0]}"
            )
        require_finite(model)
    model.__class__ = type(model).__base__
    model.config._name_or_path = str(folder)
    if (folder / GENERATION_CONFIG).is_file():
        with wrapped_errors(f"{folder / GENERATION_CONFIG} must say how to generate", REMADE):
            model.generation_config = GenerationConfig.from_pretrained(folder, **DATA_ONLY)
    return model.eval()


def _numbers(model: Any) -> int:
    """Weights, those that are tied counted once."""
    return sum({id(t): t.numel() for t in model.state_dict(keep_vars=True).values()}.values())
