"""Exporter `onnx`: a graph with the plain cache as inputs and outputs, for onnxruntime and its kin."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kvcompile.errors import KvcompileError
from kvcompile.exporters.base import Exporter

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompile.plan.plan import LayerPlan, Plan

FILE = "model.onnx"
NEEDS = ("onnx", "onnxscript")
USAGE = """\
`model.onnx` reads new tokens and the keys and values of those before, and gives logits and the keys and values of all.
Names: `input_ids [B, Q]`, `past_key_values.<layer>.key` and `.value [B, H_kv, P, D]`, `logits [B, Q, vocabulary]`,
`present.<layer>.key` and `.value [B, H_kv, P + Q, D]`. Layers that read another layer's cache have none of their own.
Positions follow from `P`, so sequences are not padded; a prompt begins with `P = 0`.

```python
import numpy
import onnxruntime


def generate(folder, prompt, count):
    # prompt [B, T], int64; yields count tokens [B, 1], greedily
    session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()[1:]]
    _, heads, _, dim = session.get_inputs()[1].shape
    kind = numpy.float16 if "float16" in session.get_inputs()[1].type else numpy.float32
    logits, *cache = session.run(None, {
        "input_ids": prompt, **{name: numpy.zeros((len(prompt), heads, 0, dim), kind) for name in names}
    })
    for _ in range(count):
        token = logits[:, -1:].argmax(-1)
        yield token
        logits, *cache = session.run(None, {"input_ids": token, **dict(zip(names, cache, strict=True))})
```"""


@dataclass(frozen=True)
class ONNX(Exporter):
    """One graph for prompt and decoding; every layer keeps every token, so it takes structural stacks only."""

    name: ClassVar[str] = "onnx"
    summary: ClassVar[str] = "a graph with the cache as inputs and outputs, for onnxruntime (structural stacks)"
    usage: ClassVar[str] = USAGE

    def refuse(self, plan: Plan, model_config: Any) -> None:
        """Raise KvcompileError for stacks that drop or encode tokens, and without the packages that write ONNX."""
        from kvcompile.exporters.static.supports import refuse

        missing = [name for name in NEEDS if find_spec(name) is None]
        if missing:
            raise KvcompileError(
                "writing ONNX needs more packages", f"no {', '.join(missing)}", "pip install 'kvcompile[onnx]'"
            )
        if plan.dtype not in ("float32", "float16"):
            raise KvcompileError("onnxruntime runs float32 and float16 on CPUs", plan.dtype, "model.dtype=float32")
        for p in plan.layers:
            if p.latent is not None:
                raise KvcompileError(
                    "a cache that the caller holds must be of keys and values", "latent rows", "export=[deepseek]"
                )
            if p.selection is not None:
                raise KvcompileError(
                    "a cache that the caller holds must keep every token", f"{p.selection.policy!r} drops some"
                )
            if p.storage.quantized:
                raise KvcompileError(
                    "a cache that the caller holds must be of plain numbers", f"{p.storage.policy!r} encodes them"
                )
        refuse(plan, model_config)

    def write(self, model: Any, tokenizer: Any, folder: Path) -> None:
        """Trace, translate and save. Raises KvcompileError where the model's own layers cannot be translated."""
        import torch

        from kvcompile.exporters.static.growing import GrowingProgram
        from kvcompile.exporters.static.modules import traceable

        program = GrowingProgram(model)
        plan: Plan = program.plan
        ids = torch.zeros(2, 3, dtype=torch.int64, device="cpu")
        past = tuple(x for p in plan.owners for x in _past(p, plan.dtype))
        batch, new, past_tokens = (torch.export.Dim(name, min=1) for name in ("batch", "new", "past"))
        with traceable(program):
            exported = torch.onnx.export(
                program,
                (ids, *past),
                dynamo=True,
                verbose=False,
                input_names=["input_ids", *_names("past_key_values", plan)],
                output_names=["logits", *_names("present", plan)],
                dynamic_shapes=({0: batch, 1: new}, tuple({0: batch, 2: past_tokens} for _ in past)),
            )
        if exported is None:
            raise RuntimeError("torch.onnx.export gave no program")
        exported.save(str(folder / FILE), external_data=True)


def _names(kind: str, plan: Plan) -> list[str]:
    return [f"{kind}.{p.index}.{part}" for p in plan.owners for part in ("key", "value")]


def _past(p: LayerPlan, dtype: str) -> tuple[Tensor, Tensor]:
    import torch

    empty = torch.zeros(2, p.kv_heads, 5, p.head_dim, dtype=getattr(torch, dtype), device="cpu")
    return empty, empty.clone()
