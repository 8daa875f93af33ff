"""What each exporter writes, run by others: size, speed, and how far its logits are from the compiled model's.

    python benchmarks/exports.py --stack policy=mqa --llama VENV/bin/python --out benchmarks/results/exports-mqa
    python benchmarks/exports.py --stack policy=snapkv stack.snapkv.budget=256 --exporters torch aoti

Every export is run by another process that never imports kvcompile: a prompt of text, then the tokens that the compiled
model chooses, one by one. Times are of single steps; run it on a machine that does nothing else (with --keep, a second
time: exports take minutes, their runs seconds). An export that is refused is a row with the reason. `gguf` runs under
llama-cpp-python, in this interpreter or in the one that --llama names, or, with `--llama transformers`, under that.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exports_run import timed
from tabulate import tabulate

import kvcompile
from kvcompile.calibration.text import sentences
from kvcompile.config.schema import ModelConfig
from kvcompile.errors import KvcompileError
from kvcompile.exporters.registry import discover
from kvcompile.models.loading import load

RUN = Path(__file__).with_name("exports_run.py")
TAIL = 60  # lines that are kept of what a failed run said
ERROR = re.compile(r"[\w.]+(Error|Exception|Exit|Interrupt)\b")  # how the last line of a traceback begins


@torch.no_grad()
def expected(model: Any, ids: Any, count: int) -> tuple[Any, dict[str, Any]]:
    """The tokens `[count]` that the compiled model chooses after `ids`; its logits and times over them."""
    out = model.generate(torch.from_numpy(ids), max_new_tokens=count, do_sample=False, eos_token_id=None)
    tokens = out[0, ids.shape[1] :].numpy()
    cache = model.new_cache()

    def step(piece: Any) -> Any:
        with torch.no_grad():
            return model(torch.from_numpy(piece), past_key_values=cache, logits_to_keep=1).logits.numpy()

    return tokens, timed(step, ids, tokens)


def row(found: Any, wanted: Any) -> dict[str, Any]:
    """What was found, beside what was wanted."""
    logits, best = found["logits"], wanted["logits"].argmax(-1)
    step = statistics.median(found["taken"][1:].tolist())
    return {
        "max logit difference": f"{np.abs(logits - wanted['logits']).max():.1e}",
        "same greedy token": f"{int((logits.argmax(-1) == best).sum())}/{len(best)}",
        "prefill s": round(float(found["taken"][0]), 2),
        "decode ms": round(1000 * step, 1),
        "tokens/s": round(1 / step, 1),
    }


def through(exporter: str, model: Any, tokenizer: Any, place: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run one exporter, run what it wrote elsewhere, and compare; what is refused is a row with the reason."""
    made, took = place / f"{exporter}.json", dict[str, Any]()
    if not made.is_file():
        sizes = {"prompt": args.prompt, "new": args.tokens}
        options = {f.name: sizes[f.name] for f in dataclasses.fields(discover()[exporter]) if f.name in sizes}
        begin = time.perf_counter()
        try:
            done = kvcompile.export(model, exporter, place / exporter, tokenizer, **options)
        except KvcompileError as error:
            return {"exporter": exporter, "note": f"refused: {error}"}
        took = {"export s": round(time.perf_counter() - begin)}
        made.write_text(json.dumps({"MB": round(done.bytes / 1e6)}))
    return {"exporter": exporter, **ran(exporter, place, args), **json.loads(made.read_text()), **took}


def ran(exporter: str, place: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What another process measures of an export, beside what was expected."""
    read = exporter == "gguf" and args.llama == "transformers"
    python = args.llama if exporter == "gguf" and not read else sys.executable
    files = [str(place / name) for name in (exporter, "given.npz", f"{exporter}.npz")]
    command = [python, str(RUN), "gguf_in_transformers" if read else exporter, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-TAIL:] or [f"exit code {done.returncode}"]
        why = next((line for line in said if ERROR.match(line)), said[-1])
        return {"note": f"did not run: {why}", "stderr": said}
    found, wanted = (np.load(place / f"{name}.npz") for name in (exporter, "wanted"))
    return row(found, wanted)


def main() -> None:
    """Compile, export, run each export elsewhere, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stack", nargs="+", default=["policy=mqa"], help="overrides as on the command line")
    parser.add_argument("--exporters", nargs="+", default=list(discover()), choices=list(discover()))
    parser.add_argument("--model", help="a path (none: the default model)")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--llama", default=sys.executable, help="interpreter that has llama_cpp")
    parser.add_argument("--keep", help="folder for the exports; those that lie there are run again, not made again")
    parser.add_argument("--out", help="file to write, without its ending")
    args = parser.parse_args()
    model, tokenizer = load(ModelConfig(pretrained=args.model))
    model = kvcompile.compile(model, overrides=args.stack, tokenizer=tokenizer)
    ids = tokenizer(" ".join(sentences()), return_tensors="np")["input_ids"][:, : args.prompt].astype(np.int64)
    tokens, wanted = expected(model, ids, args.tokens)
    rows = [{"exporter": "(compiled model, here)", **row(wanted, wanted)}]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(args.keep or folder)
        place.mkdir(parents=True, exist_ok=True)
        np.savez(place / "given.npz", ids=ids, tokens=tokens)
        np.savez(place / "wanted.npz", **wanted)
        for exporter in args.exporters:
            rows.append(through(exporter, model, tokenizer, place, args))
            print(*(f"{key}: {value}" for key, value in rows[-1].items() if key != "stderr"), sep=", ", flush=True)
            if "stderr" in rows[-1]:
                print(*rows[-1]["stderr"], sep="\n", file=sys.stderr, flush=True)
    keys = list(dict.fromkeys(key for each in rows for key in each if key != "stderr"))
    table = tabulate([[each.get(key, "") for key in keys] for each in rows], keys, tablefmt="github")
    print(table)
    if args.out:
        machine = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
        head = f"{time.strftime('%Y-%m-%d')}, {machine}, a prompt of {args.prompt} tokens, then {args.tokens}"
        told = " ".join(w if w != args.llama or w == "transformers" else "VENV/bin/python" for w in sys.argv)
        words = told.replace(f" --keep {args.keep}", "")
        Path(f"{args.out}.md").write_text(f"{head}\n\n    python {words}\n\n{table}\n")
        Path(f"{args.out}.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
