"""`kvcompile doctor`: what this machine runs, and whether that is right; exit code 1 where something is not well."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

from kvcompile.errors import KvcompileError

if TYPE_CHECKING:
    from kvcompile.doctor.examine import Examination
    from kvcompile.doctor.recipes import Needs


def main(arguments: Sequence[str]) -> None:
    """Examine this machine and print it. Exits with 1 where something is not well. Raises KvcompileError."""
    options = _options(arguments)
    from kvcompile.doctor.examine import examine
    from kvcompile.progress import progress_bar, silent

    if options.json:
        found = examine(options.settings, options.checks, options.again, silent)
        sys.stdout.write(json.dumps(as_json(found), indent=1) + "\n")
    else:
        with progress_bar() as progress:
            found = examine(options.settings, options.checks, options.again, progress)
        sys.stdout.write(as_text(found))
    if found.problems:
        raise SystemExit(1)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kvcompile doctor",
        description="What this machine can run: devices, compilers, the backend of each recipe, and a check of every "
        "kernel that the recipes need. No weights are read. Exit code 0: all is well; 1: something is not.",
        allow_abbrev=False,
    )
    parser.add_argument("settings", nargs="*", metavar="SETTING", help="for all recipes: model=qwen2, kernels=triton")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--again", action="store_true", help="check also what was checked before")
    parser.add_argument("--no-checks", dest="checks", action="store_false", help="run no kernel")

    def refuse(message: str) -> NoReturn:
        raise KvcompileError(f"kvcompile doctor: {message}", fix="kvcompile doctor --help shows what it takes")

    parser.error = refuse  # type: ignore[method-assign]
    options = parser.parse_args(list(arguments))
    for setting in options.settings:
        if setting.startswith(("recipe=", "policy=", "stack.")):
            raise KvcompileError("kvcompile doctor looks at every recipe: its settings name none", setting)
    return options


def as_json(found: Examination) -> dict[str, Any]:
    """Everything, in plain types."""
    return {
        "well": not found.problems,
        "problems": found.problems,
        "machine": {what: how for what, how, _ in found.machine},
        "device": str(found.device),
        "backend": found.backend.name,
        "recipes": {each.recipe: each.problem or _served(found, each) for each in found.recipes},
        "kernels": [
            {"name": spec.name, "dtype": str(dtype).removeprefix("torch."), "taken": _taken(found, verdict)}
            | {key: _number(value) for key, value in asdict(verdict).items()}
            for spec, dtype, verdict in found.kernels
        ],
    }


def _number(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_text(found: Examination) -> str:
    """For a terminal."""
    from tabulate import tabulate

    blocks = ["machine", tabulate([line[:2] for line in found.machine], tablefmt="plain")]
    blocks += [f"\nrecipes on {found.device}: layers by who attends", tabulate(_recipes(found), tablefmt="plain")]
    if found.kernels:
        rows = [
            [
                spec.name,
                "right" if v.right else "WRONG",
                f"{v.error:.0e}",
                f"{v.kernel * 1e3:.3f}",
                f"{v.library * 1e3:.3f}",
            ]
            for spec, _, v in found.kernels
        ]
        head = [f"{found.backend.name} kernel", "", "difference", "ms", "library ms"]
        blocks += ["", tabulate(rows, head, tablefmt="plain", disable_numparse=True, colalign=_aligned(head))]
    lines = [f"- {problem}" for problem in found.problems]
    blocks += ["", *(["Not well:", *lines] if lines else ["All is well."])]
    return "\n".join(blocks) + "\n"


def _aligned(head: Sequence[str]) -> list[str]:
    return ["left", "left", *["right"] * (len(head) - 2)]


def _recipes(found: Examination) -> list[list[str]]:
    """Recipes that are served alike on one line."""
    alike: dict[str, list[str]] = {}
    for each in found.recipes:
        served = _served(found, each)
        whole = len(served) == 1
        words = each.problem or ", ".join(name if whole else f"{name} {n}" for name, n in served.items())
        alike.setdefault(words, []).append(each.recipe)
    return [[words, _wrapped(recipes)] for words, recipes in alike.items()]


def _wrapped(recipes: list[str]) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(", ".join(recipes), 100))


def _served(found: Examination, each: Needs) -> dict[str, int]:
    """Layers by who attends; without checks, those of a backend that needs one are not known yet."""
    if found.backend.checked is None or found.kernels:
        return each.served()
    layers = len(each.plan.decoder.layers) if each.plan else 0
    return {f"{found.backend.name} or sdpa, once checked": layers}


def _taken(found: Examination, verdict: Any) -> bool:
    """Whether `kernels=` takes a kernel: all are where the backend needs no check."""
    return bool(verdict.taken) if found.backend.checked else True
