"""Prompts of different lengths in one left-padded batch, each answered as if it were alone.

    python examples/padded_batch.py "Once upon a time" "The three largest cities of France are"

`--model` takes a folder or a hub id of any model that kvcompile knows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcompile

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def continued(model: Any, tokenizer: Any, prompts: Sequence[str], new: int) -> list[str]:
    """One text a prompt. Padding goes on the left; pads are never stored in the cache."""
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=new, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def batch(model_name: str, prompts: Sequence[str], new: int = 30) -> tuple[list[str], list[str]]:
    """What the batch says, and what each prompt says alone."""
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(model_name)
    # heads keep different numbers of tokens, in a batch as alone
    model = kvcompile.compile(model, recipe="adakv", tokenizer=tokenizer)
    alone = [continued(model, tokenizer, [prompt], new)[0] for prompt in prompts]
    return continued(model, tokenizer, prompts, new), alone


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="folder or hub id")
    parser.add_argument("prompts", nargs="+")
    args = parser.parse_args()
    together, alone = batch(args.model, args.prompts)
    for prompt, text in zip(args.prompts, together, strict=True):
        print(f"{prompt}{text}\n")
    print("as alone" if together == alone else f"alone: {alone}")


if __name__ == "__main__":
    main()
