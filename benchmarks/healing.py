"""What a healing recipe regains: runs its command and keeps report, curve and picture of it.

    python benchmarks/healing.py --out benchmarks/results/mqa_heal recipe=mqa_heal model=llama

Writes <out>.json (kvcompile's report), <out>.md and <out>.png; an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from tabulate import tabulate

from kvcompile.heal.record import HealRecord
from kvcompile.report import files
from kvcompile.report.plot import draw
from kvcompile.report.tables import markdown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", help="as for kvcompile")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--artifact", type=Path, default=Path("outputs/healing"))
    parser.add_argument("--done", action="store_true", help="the command has been run: the artifact is there")
    parser.add_argument("--note", default="", help="what the numbers do not say, e.g. what else the machine did")
    args = parser.parse_args()
    command = ["kvcompile", *args.overrides]
    if not args.done:
        subprocess.run([sys.executable, "-m", *command, f"output={args.artifact}"], check=True)
    made = replace(files.read(args.artifact), recipe=shlex.join(command))
    if made.healed is None:
        sys.exit("nothing was healed: give heal.tokens")
    args.out.with_suffix(".json").write_text(json.dumps(made.to_json(), indent=1) + "\n", encoding="utf-8")
    draw(made, args.out.with_suffix(".png"))
    text = markdown(made).replace("(report.png)", f"({args.out.name}.png)")
    head = f"{datetime.date.today()}\n\n    {shlex.join(command)}\n\n" + (f"{args.note}\n\n" if args.note else "")
    args.out.with_suffix(".md").write_text(f"{head}{text}\n{curve(made.healed)}", encoding="utf-8")


def curve(record: HealRecord) -> str:
    """Every point at which held-out text was measured."""
    measured = [p for p in record.curve if p.perplexity is not None]
    rows = [(p.tokens, f"{p.seconds / 60:.1f}", p.stage, f"{p.perplexity:,.2f}") for p in measured]
    grid = tabulate(rows, ("tokens", "minutes", "stage", "held-out perplexity"), tablefmt="pipe", disable_numparse=True)
    return f"## Curve\n\n{grid}\n"


if __name__ == "__main__":
    main()
