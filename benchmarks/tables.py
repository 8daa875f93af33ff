"""How a benchmark's table is written: the machine, the command, the table, and its rows as JSON beside it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from cpu_kernels import processor
from tabulate import tabulate


def write(out: str, table: str, rows: list[dict[str, Any]], dtype: str = "", note: str = "") -> None:
    """Write `out`.md and `out`.json. dtype: of the model; note: a paragraph between the command and the table."""
    threads = torch.get_num_threads()
    clock = "CPU times of one thread" if threads == 1 else f"{threads} threads"
    machine = time.strftime("%Y-%m-%d"), processor(), clock, f"torch {torch.__version__}", dtype
    head = ", ".join(filter(None, machine))
    command = f"    {'OMP_NUM_THREADS=1 ' * (threads == 1)}python {' '.join(sys.argv)}"
    Path(out + ".md").write_text("\n\n".join(filter(None, (head, command, note, table))) + "\n")
    Path(out + ".json").write_text(json.dumps({"machine": head, "rows": rows}, indent=1) + "\n")


def show(out: str | None, rows: list[dict[str, Any]], dtype: str = "", note: str = "") -> None:
    """Print the rows as a table, and write it where `out` says (None: nowhere)."""
    table = tabulate(rows, headers="keys", tablefmt="github")
    print(table)
    if out:
        write(out, table, rows, dtype, note)
