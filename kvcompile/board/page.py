"""A board as one HTML file: data, style and script in it, nothing fetched."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from kvcompile.board.labels import flat
from kvcompile.board.standings import KINDS, OTHER, Board, Panel, Standing
from kvcompile.board.tables import LEGEND, of_dense, quality, share
from kvcompile.report.units import size
from kvcompile.tasks.scores import Estimate


def page(board: Board) -> str:
    """The page. Its policy lets no script run but its own, and nothing be fetched.

    Names that rows bring are data: the script puts them in as text, never as markup.
    """
    style, script = (files("kvcompile.board").joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    parts = {
        "policy": f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'",
        "style": style,
        "script": script,
        "data": _data(board),
    }
    template = files("kvcompile.board").joinpath("page.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _hash(text: str) -> str:
    """What a content security policy calls an inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _data(board: Board) -> str:
    """The board as JSON that cannot end the element it stands in."""
    data = {
        "panels": [_panel(panel) for panel in board.panels],
        "kinds": [*KINDS.values(), OTHER],
        "notes": list(board.notes),
        "legend": list(LEGEND),
    }
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _panel(panel: Panel) -> dict[str, Any]:
    standings = [_standing(standing, panel.perplexity) for standing in panel.standings]
    options = ", ".join(f"{key}={value}" for key, value in flat(panel.options))
    setting = "text read" if panel.perplexity else f"question {panel.question}"
    return {**_finite(asdict(panel)), "options": options, "setting": setting, "standings": standings}


def _standing(standing: Standing, perplexity: bool) -> dict[str, Any]:
    """The numbers, for places and order, and as `text` what is read."""
    score = quality(standing.score, perplexity)
    text = {
        "share": share(standing.share),
        "share_run": share(standing.share_run),
        "held": size(standing.held),
        "positions": size(standing.positions),
        "tokens": f"{standing.tokens:,.0f}",
        "score": score if perplexity else _percent(score),
        "dense": _said_of_dense(standing.dense, perplexity),
        "parts": {
            name: f"{value:,.2f}" if perplexity else f"{100 * value:.0f} %" for name, value in standing.parts.items()
        },
        "seconds": f"{standing.seconds:,.0f} s",
    }
    return {**_finite(asdict(standing)), "text": text}


def _said_of_dense(estimate: Estimate | None, perplexity: bool) -> str:
    text = of_dense(estimate, perplexity)
    return text if perplexity or not text else _percent(text)


def _percent(text: str) -> str:
    """`95 (76-99)` with its unit: `95 % (76-99)`."""
    value, _, rest = text.partition(" ")
    return f"{value} % {rest}".rstrip()


def _finite(value: Any) -> Any:
    """Plain data in which None stands for NaN and infinities, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
