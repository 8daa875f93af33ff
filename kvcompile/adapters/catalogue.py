"""What is known of each model type, in words: for `kvcompile ls models` and the page on models."""

from __future__ import annotations

from kvcompile.adapters.architecture import Architecture, level, nothing
from kvcompile.adapters.architectures import architecture, known
from kvcompile.adapters.around import AROUND, no_layers
from kvcompile.adapters.built_in import BUILT_IN
from kvcompile.adapters.refused import REFUSED

FALL = "logits fall with distance (no recall, no expected_attention)"
TEXT = "its text stack, in Python; no policies that convert weights; no artifact"


def limits(known_as: Architecture) -> list[str]:
    """What of kvcompile an architecture cannot have."""
    adapter = known_as.adapter
    return [
        text
        for text, limited in (
            ("no policies that convert weights", adapter.layout is None),
            ("a prompt is read at once and never again (no prefill_chunk, kvzip ...)", known_as.states is not nothing),
            ("one latent a token for all heads (no budgets of heads, no ghost)", adapter.native),
            (f"{'' if not adapter.turnable else 'with alibi=True '}{FALL}", known_as.alibi is not level),
            ("keys are not turned on (compact positions, infllm, ghost)", not adapter.turnable),
        )
        if limited
    ]


def around_limits(name: str) -> str:
    """What a model of images and text cannot have."""
    at_once = AROUND[name].both_ways is not no_layers
    return f"{TEXT}; an image is read in one pass (no prefill_chunk)" if at_once else TEXT


def catalogue() -> dict[str, str]:
    """A line for each known model type: a checkpoint that has it, and its limits."""
    lines = {}
    for name in known():
        example = BUILT_IN[name].example if name in BUILT_IN else ""
        of = f"such as {example}" if example else "compiled" if name in BUILT_IN else "of another package"
        lines[name] = "; ".join([of, *limits(architecture(name))])
    images = {name: f"such as {model.example}; {around_limits(name)}" for name, model in AROUND.items()}
    return dict(sorted({**lines, **images}.items()))


def page() -> str:
    """The tables of the page on models, as Markdown."""
    rows = ["| `model_type` | for example | limits |", "|---|---|---|"]
    for name, family in BUILT_IN.items():
        rows.append(f"| `{name}` | {family.example} | {'; '.join(limits(architecture(name)))} |")
    around = ["| with images | for example | limits |", "|---|---|---|"]
    for name, model in AROUND.items():
        around.append(f"| `{name}` | {model.example} | {around_limits(name)} |")
    reasons: dict[str, list[str]] = {}
    for name, reason in REFUSED.items():
        reasons.setdefault(reason, []).append(f"`{name}`")
    refused = ["| refused | because |", "|---|---|", *(f"| {', '.join(n)} | {r} |" for r, n in reasons.items())]
    return "\n".join([*rows, "", *around, "", *refused, ""])
