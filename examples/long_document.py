"""A question about a long text: read in chunks, evicted between them, answered from a tenth of the tokens.

    python examples/long_document.py --text book.txt --question "Who opens the door?"

`--model` takes a folder or a hub id of any model that kvcompile knows.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcompile

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def answer(model_name: str, text: str, question: str, new: int = 40) -> str:
    """What the compressed model says, after a line about the cache."""
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name)
    # votes of the last queries decide what stays, so the question comes last
    model = kvcompile.compile(model, recipe="snapkv_kivi", overrides=["prefill_chunk=1024"])
    inputs = tokenizer(f"{text}\n\nQuestion: {question}\nAnswer:", return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=new, do_sample=False, return_dict_in_generate=True)
    read = inputs["input_ids"].shape[1]
    print(f"{read:,} tokens read, {out.past_key_values.nbytes() / 2**20:.2f} MiB of cache held")
    return tokenizer.decode(out.sequences[0, read:], skip_special_tokens=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="folder or hub id")
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--question", required=True)
    args = parser.parse_args()
    print(answer(args.model, args.text.read_text("utf-8"), args.question))


if __name__ == "__main__":
    main()
