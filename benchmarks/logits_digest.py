"""Whether a change leaves every recipe's logits as they were, to the bit.

    python benchmarks/logits_digest.py --out before.json        # on the commit before
    python benchmarks/logits_digest.py --against before.json    # on the commit after, same machine and packages

One row a recipe (those that heal apart) and model: SHA-256 of the logits of a prompt and of decoded tokens over its
cache. Models: tiny seeded ones of several families (`--tiny`), and the default model (`--real`); both without a flag.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcompile

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from tiny import ARCHITECTURES, tiny_ids, tiny_model, tiny_tokenizer

STEPS = 40  # decoded tokens: enough for a second round of encoding
RECIPES = sorted(
    f.name.removesuffix(".yaml") for f in files("kvcompile.recipes.recipe").iterdir() if "heal" not in f.name
)


@torch.inference_mode()
def digest(model: Any, ids: torch.Tensor) -> str:
    """Of all logits of `ids [B, n]`: its first n - STEPS tokens as a prompt, the others one by one."""
    prompt = ids.shape[1] - STEPS
    out = model(ids[:, :prompt])
    seen = hashlib.sha256(out.logits.numpy().tobytes())
    for i in range(prompt, ids.shape[1]):
        seen.update(model(ids[:, i : i + 1], past_key_values=out.past_key_values).logits.numpy().tobytes())
    return seen.hexdigest()[:16]


def told(work: Any) -> str:
    """What `work` returns, or the first words of its refusal."""
    try:
        return str(work())
    except kvcompile.KvcompileError:
        return "refused"


def tiny(recipe: str, family: str) -> str:
    """The digest of a tiny seeded model."""
    model = kvcompile.compile(tiny_model(family), recipe, (), tiny_tokenizer())
    return digest(model, tiny_ids(2, 120 + STEPS))


def real(recipe: str) -> str:
    """The digest of the default model, on the offline text."""
    folder = next(p for p in (Path.home() / ".cache/kvcompile").iterdir() if (p / "config.json").exists())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = files("pydoc_data").joinpath("topics.py").read_text("utf-8")
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=600 + STEPS)["input_ids"]
    return digest(kvcompile.compile(model, recipe, tokenizer=tokenizer), ids)


def main() -> None:
    """Print the digests; exit 1 where one differs from those of `--against`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--real", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, str] = {}
    both = given.tiny == given.real
    for recipe in RECIPES:
        for family in ARCHITECTURES if both or given.tiny else ():
            found[f"{recipe} {family}"] = told(lambda r=recipe, f=family: tiny(r, f))
        if both or given.real:
            found[f"{recipe} default model"] = told(lambda r=recipe: real(r))
        print(recipe, *{v for k, v in found.items() if k.startswith(f"{recipe} ")}, flush=True)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if given.against:
        before = json.loads(given.against.read_text("utf-8"))
        changed = [name for name in before if before[name] != found.get(name)]
        print(f"{len(before)} digests, {len(changed)} differ", *changed, sep="\n  ")
        sys.exit(bool(changed))


if __name__ == "__main__":
    main()
