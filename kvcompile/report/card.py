"""The model card: `README.md` of an artifact or an export, for people and, in its first lines, for a model hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompile.models.provenance import UNKNOWN, Base, base_of, in_words, versions

if TYPE_CHECKING:
    from kvcompile.plan.plan import Plan
    from kvcompile.report.report import Report

TOKENS = 1024  # of the prompt that the plan is told for, where nothing was measured
ARTIFACT = """```python
import kvcompile
from transformers import AutoTokenizer

model, tokenizer = kvcompile.load("<this folder>"), AutoTokenizer.from_pretrained("<this folder>")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=30)[0]))
```

transformers alone does not open this folder: it would run the model without what was compiled into it."""


def write(model: Any, folder: Path, usage: str, measured: Report | None = None) -> Path:
    """Write the card of a compiled model into `folder`, return its path. usage: Markdown, how to load what is there."""
    path = folder / CARD
    path.write_text(text(model, usage, measured), encoding="utf-8")
    return path


def text(model: Any, usage: str, measured: Report | None = None) -> str:
    """The card as Markdown; without a report (`measured`) it says that nothing was measured."""
    from kvcompile.report.tables import before_and_after

    compiled, base = model.kvcompile, base_of(model.config)
    policies = [a.name for a in compiled.plan.applied]
    title = f"{base.name}, compiled with {' -> '.join(policies) or 'no policy'}"
    facts = before_and_after(measured) if measured else "Nothing was measured when this was saved."
    parts = [
        f"---\n{_front(base, policies, 'kvcompile' if usage == ARTIFACT else 'transformers')}\n---",
        f"# {title}",
        _lead(base),
        f"## How to load\n\n{usage}" if usage else "",
        facts,
        f"Measured on: {measured.machine}." if measured and measured.machine else "",
        _plan(compiled.plan, measured.tokens if measured else TOKENS),
        f"## Recipe\n\n```yaml\n{compiled.recipe.strip()}\n```",
        _provenance(base, compiled.plan),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front(base: Base, policies: list[str], library: str) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        license=base.licence,
        base_model=base.hub,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["kvcompile", "kv-cache", *policies],
    )
    return str(data.to_yaml()).strip()


def _lead(base: Base) -> str:
    model = f"[{base.hub}](https://huggingface.co/{base.hub})" if base.hub else base.name
    return f"{model} with a smaller KV cache, made by kvcompile {versions()['kvcompile']}."


def _plan(plan: Plan, tokens: int) -> str:
    from tabulate import tabulate

    from kvcompile.report.plan_table import cache_bytes, headings, rows_of, total
    from kvcompile.report.units import size

    nbytes, dense = cache_bytes(plan, 1, tokens)
    columns = headings(plan)
    align = ["left", *["right"] * (len(columns) - 1)]
    grid = tabulate(rows_of(plan, 1, tokens), columns, tablefmt="pipe", colalign=align, disable_numparse=True)
    facts = f"In all {size(nbytes)} of {size(dense)} ({nbytes / dense:.1%}); {total(plan, 1, tokens)}." if dense else ""
    return f"## Plan\n\nThe cache after a prompt of {tokens:,} tokens, by layer.\n\n{grid}\n\n{facts}"


def _provenance(base: Base, plan: Plan) -> str:
    lines = {
        "base model": base.hub or base.name,
        "its version": base.commit,
        "its licence": base.licence if base.licence != UNKNOWN else "unknown: check it before you pass this on",
        "made by": in_words(versions()),
        "plan": f"SHA-256 {plan.digest()} of its JSON",
    }
    facts = "\n".join(f"- {name}: {value}" for name, value in lines.items() if value)
    return f"## Provenance\n\n{facts}"


CARD = "README.md"
