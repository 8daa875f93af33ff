"""Exporter `hf`: a plain transformers checkpoint of the model's own class, with the converted weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kvcompile.exporters.base import Exporter
from kvcompile.exporters.checkpoint import USAGE, require_plain
from kvcompile.plan.plan import Plan


@dataclass(frozen=True)
class HF(Exporter):
    """`AutoModelForCausalLM.from_pretrained(folder)`, without kvcompile: config, safetensors, tokenizer.

    Exact for fewer KV heads (the class has them as `num_key_value_heads`) and for rotations, which are in the weights.
    weights_only: let policies that act on the cache at run time stay behind, instead of refusing.
    """

    name: ClassVar[str] = "hf"
    summary: ClassVar[str] = "plain transformers checkpoint, loads without kvcompile"
    usage: ClassVar[str] = USAGE
    weights_only: bool = False

    def refuse(self, plan: Plan, model_config: Any) -> None:
        """What a checkpoint of the model's own class cannot hold."""
        require_plain(plan, model_config, self.weights_only, "export.hf.weights_only")

    def write(self, model: Any, tokenizer: Any, folder: Path) -> None:
        """Config, generation config, weights and tokenizer, as transformers saves them."""
        from kvcompile.artifact.weights import write_checkpoint

        write_checkpoint(model, folder, tokenizer)
