"""What transformers' reader of GGUF files leaves out: rotary settings and windows are taken, other tensors refused."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvcompile.errors import KvcompileError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

FACTORS = "rope_freqs.weight"
ORIGINAL = "original_max_position_embeddings"
SCALING = {"type", "factor", "original_context_length", "finetuned"}  # what is read of <architecture>.rope.scaling.*
BETWEEN = 1e-4  # a factor nearer than this to 1, or to the largest, is taken to be it
FIX = "use the safetensors checkpoint of this model"


@dataclass(frozen=True)
class Contents:
    """Names of a GGUF file's tensors, its settings `rope.scaling.*`, rotary factors `[D/2]`, sliding window.

    settings: all of its `family`, which is what llama.cpp calls the architecture, by the rest of their names.
    """

    tensors: tuple[str, ...]
    scaling: dict[str, Any]
    factors: Tensor | None
    window: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    family: str = ""

    def take_rope(self, config: PretrainedConfig) -> None:
        """Set the rotary settings of `config` to those of the file, in place.

        Raises KvcompileError where they are of no kind that transformers computes.
        """
        alone = set(self.scaling) <= {"original_context_length", "finetuned"}  # which scales nothing
        scaled = not alone and self.scaling.get("type", "linear") != "none"
        if self.factors is None and not scaled:
            return
        ropes: dict[str, Any] = dict(getattr(config, "rope_parameters", None) or {})
        sliding = "sliding_attention" in ropes and self.factors is None  # gemma3: layers that slide are not scaled
        plain: dict[str, Any] = dict(ropes["full_attention"]) if sliding else ropes
        if "rope_theta" not in plain or (self.factors is not None and scaled):
            got = (
                f"{FACTORS} and rope.scaling" if "rope_theta" in plain else "rope.scaling where layers turn differently"
            )
            raise KvcompileError("a GGUF file must give one set of rotary settings for all layers", got, FIX)
        plain["rope_type"] = "default"
        rope = _of_metadata(self.scaling, plain) if self.factors is None else _of_factors(self.factors, plain, config)
        config.rope_parameters = {**ropes, "full_attention": rope} if sliding else rope

    def take_window(self, config: PretrainedConfig) -> None:
        """Set the sliding window of `config` to that of the file, in place: a config has its family's otherwise.

        Raises KvcompileError for a window that the family has no place for.
        """
        window, by_layer = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
        # gemma: which layers is the family's to say
        if self.window == window or (by_layer and self.window is None):
            return
        if not hasattr(config, "sliding_window") or by_layer:
            raise KvcompileError(
                f"the sliding window of a GGUF file must be one that {config.model_type!r} has",
                f"{self.window} in the file and {window} in the config",
                FIX,
            )
        config.sliding_window = self.window

    def require_taken(self, model: PreTrainedModel) -> None:
        """Raise KvcompileError if the file has a tensor that no weight of the model was read from."""
        from transformers.integrations.gguf.utils import is_gguf_arch_supported
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        if is_gguf_arch_supported(self.family):  # a reader that says itself what it leaves
            return
        places = get_gguf_hf_weights_map(model, TENSOR_PROCESSORS.get(self.family, TensorProcessor)())
        known = {*places, *(f"{name}.weight" for name in places), FACTORS}  # experts have no `.weight` in transformers
        left = [name for name in self.tensors if name not in known]
        if left:
            raise KvcompileError(
                f"every tensor of a GGUF file must have its place in the model ({model.config.model_type})",
                f"{left[0]} and {len(left) - 1} more that transformers leaves out" if left[1:] else left[0],
                FIX,
            )


def contents(path: Path) -> Contents:
    """What the file says of itself; the weights are not read."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    scaling = {
        name.partition(".rope.scaling.")[2]: field.contents()
        for name, field in reader.fields.items()
        if ".rope.scaling." in name
    }
    factors = next(
        (
            torch.tensor(t.data, dtype=torch.float64, device="cpu").flatten()
            for t in reader.tensors
            if t.name == FACTORS
        ),
        None,
    )
    windows = [field.contents() for name, field in reader.fields.items() if name.endswith(".attention.sliding_window")]
    window = int(windows[0]) or None if windows else None
    family = str(reader.fields["general.architecture"].contents())
    settings = {
        name.removeprefix(f"{family}."): setting.contents()
        for name, setting in reader.fields.items()
        if name.startswith(f"{family}.")
    }
    return Contents(tuple(t.name for t in reader.tensors), scaling, factors, window, settings, family)


def _of_metadata(scaling: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    kind, factor = scaling.get("type", "linear"), scaling.get("factor")
    unknown = sorted(f"rope.scaling.{key}={value}" for key, value in scaling.items() if key not in SCALING)
    if kind not in ("linear", "yarn") or unknown or factor is None:
        got = ", ".join([f"rope.scaling.type={kind}", *unknown, *(["no factor"] if factor is None else [])])
        raise KvcompileError("rotary scaling of a GGUF file must be linear or yarn, given by its factor", got, FIX)
    if kind == "linear":
        return {**plain, "rope_type": kind, "factor": float(factor)}
    if "original_context_length" not in scaling:
        raise KvcompileError("yarn needs rope.scaling.original_context_length", "a GGUF file without it", FIX)
    return {**plain, "rope_type": kind, "factor": float(factor), ORIGINAL: int(scaling["original_context_length"])}


def _of_factors(factors: Tensor, plain: dict[str, Any], config: Any) -> dict[str, Any]:
    """The rotary settings whose frequencies are theta^(-2c/D) / factor_c: linear, or llama3 with its usual 1 and 4.

    llama3 divides by 1 wavelengths below O/4, by F those above O, and in between by 1 / ((1 - s)/F + s), where
    s = (O / wavelength - 1) / 3: one such wavelength gives the original length O, which the file does not hold.
    """
    most, dim = float(f"{float(factors.max()):.6g}"), 2 * len(factors)  # written as float32
    waves = 2 * math.pi * plain["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
    if torch.allclose(factors, factors[:1], rtol=1e-6):
        return {**plain, "rope_type": "linear", "factor": most} if abs(most - 1) > 1e-6 else plain
    between = (factors > 1 + BETWEEN) & (factors < most * (1 - BETWEEN))
    smooth = (1 / factors - 1 / most) / (1 - 1 / most)
    originals = (waves * (3 * smooth + 1))[between] if bool(between.any()) else waves[factors > 1].min().floor()
    rope = {
        **plain,
        "rope_type": "llama3",
        "factor": most,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        ORIGINAL: round(float(originals.median())),
    }
    if not torch.allclose(_frequencies(rope, config) * waves / (2 * math.pi), 1 / factors, rtol=1e-5):
        raise KvcompileError(
            "rotary factors of a GGUF file must be those of a linear or llama3 scaling",
            f"{FACTORS} from {float(factors.min()):.4g} to {most:.4g}",
            FIX,
        )
    return rope


def _frequencies(rope: dict[str, Any], config: Any) -> Tensor:
    """The frequencies `[D/2]` that transformers computes from rotary settings."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    trial = type(config)(**{**config.to_dict(), "rope_parameters": rope})
    frequencies: Tensor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](trial, torch.device("cpu"))[0]
    return frequencies.double()
