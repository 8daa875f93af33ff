"""Turns of a chat on one cache: each turn reads only what is new, old tokens lie in 4 bits.

    python examples/chat.py "What is a cache?" "And a small one?"

`--model` takes a folder or a hub id of any model that kvcompile knows.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcompile

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def chat(model_name: str, turns: Iterable[str], new: int = 40) -> Iterator[str]:
    """The answers, one a turn."""
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name)
    model = kvcompile.compile(model, recipe="kivi")  # forgets no token: any turn may ask about any other
    ids, cache = torch.empty(1, 0, dtype=torch.long), model.new_cache()
    for turn in turns:
        said = tokenizer(f"User: {turn}\nAssistant:", return_tensors="pt")["input_ids"]
        ids = torch.cat((ids, said), 1)
        with torch.no_grad():  # the whole conversation goes in; what the cache has seen is not read again
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                max_new_tokens=new,
                do_sample=False,
                return_dict_in_generate=True,
            )
        yield tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True)
        ids, cache = out.sequences, out.past_key_values
        print(f"{ids.shape[1]:,} tokens so far, {cache.nbytes() / 2**20:.2f} MiB of cache held")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="folder or hub id")
    parser.add_argument("turns", nargs="+", help="what the user says, turn by turn")
    args = parser.parse_args()
    for said in chat(args.model, args.turns):
        print(said)


if __name__ == "__main__":
    main()
