"""Exporter `gguf`: one file for llama.cpp and what is built on it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

from kvcompile.errors import KvcompileError
from kvcompile.exporters.base import Exporter
from kvcompile.exporters.checkpoint import require_plain
from kvcompile.plan.plan import Plan

FILE = "model.gguf"
FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # model_type -> its name in GGUF
ROPES = {"llama": ("default", "linear", "llama3")}  # fixed angles, which can be given as factors of the plain ones

USAGE = f"""With llama.cpp (`llama-cli -m {FILE}`), or its Python binding:

```python
from llama_cpp import Llama

llama = Llama("{FILE}", n_ctx=4096)
print(llama("Once upon a time", max_tokens=30)["choices"][0]["text"])
```"""


@dataclass(frozen=True)
class GGUF(Exporter):
    """`model.gguf` with weights, tokenizer and chat template; norms and biases in float32.

    dtype: of the matrices; auto keeps the model's. weights_only: as in exporter hf.
    """

    name: ClassVar[str] = "gguf"
    summary: ClassVar[str] = "one file for llama.cpp (llama, mistral, qwen2, qwen3)"
    usage: ClassVar[str] = USAGE
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    weights_only: bool = False

    def refuse(self, plan: Plan, model_config: Any) -> None:
        """Families, windows and rotary embeddings that are not written here; what a checkpoint cannot hold."""
        kind = model_config.model_type
        if find_spec("gguf") is None:
            raise KvcompileError("GGUF files need the gguf package", "none installed", "pip install kvcompile[gguf]")
        if kind not in FAMILIES:
            raise KvcompileError(f"GGUF files are written of {', '.join(FAMILIES)}", repr(kind))
        require_plain(plan, model_config, self.weights_only, "export.gguf.weights_only")
        windows = [p for p in plan.layers if p.sliding_window]
        if windows:
            raise KvcompileError(
                f"llama.cpp runs {FAMILIES[kind]!r} with full attention",
                f"a sliding window of {windows[0].sliding_window} in layer {windows[0].index}",
            )
        heads, dim, hidden = model_config.num_attention_heads, plan.layers[0].head_dim, model_config.hidden_size
        if kind == "qwen2" and heads * dim != hidden:
            raise KvcompileError(
                "llama.cpp runs 'qwen2' with as many channels in all heads as a token has",
                f"{heads} x {dim} and {hidden}",
            )
        rope = (getattr(model_config, "rope_parameters", None) or {}).get("rope_type", "default")
        known = ROPES.get(FAMILIES[kind], ("default",))
        if rope not in known:
            raise KvcompileError(f"rotary embeddings of {kind!r} are written of types {', '.join(known)}", repr(rope))

    def refuse_tokenizer(self, tokenizer: Any) -> None:
        """Tokenizers that llama.cpp would read otherwise."""
        from kvcompile.exporters.gguf.tokenizer import pre_tokenizer

        if tokenizer is not None:
            pre_tokenizer(tokenizer)

    def write(self, model: Any, tokenizer: Any, folder: Path) -> None:
        """One file; without a tokenizer it takes and gives token ids only."""
        from kvcompile.exporters.gguf.file import write_file

        write_file(model, tokenizer, folder / FILE, FAMILIES[model.config.model_type], self.dtype)
