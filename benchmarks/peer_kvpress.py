"""kvpress, in an environment of its own (it pins transformers): reads a job on stdin, writes rows as JSON.

pip install torch kvpress     # its own venv; called by benchmarks/peers.py --kvpress <that python>
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import torch
import transformers
from kvpress import AdaKVPress, ExpectedAttentionPress, SnapKVPress
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from turns import Contestant, found, race, tensors_bytes


def contestant(model: Any, press: Any) -> Contestant:
    """The model under a press (None: dense); prefill inside the press, decode outside, as its pipeline does.

    What a press masks it leaves in the modules: put back before each step, as other rows run in between.
    """
    modules = [layer.self_attn for layer in model.model.layers]

    def start(ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
        cache = DynamicCache()
        for module in modules:
            module.masked_key_indices = None
        with press(model) if press else contextlib.nullcontext():
            out = model(ids, past_key_values=cache, logits_to_keep=1)
        masked = [module.masked_key_indices for module in modules]
        return out.logits[:, -1], {"cache": cache, "at": ids.shape[1], "masked": masked}

    def step(token: torch.Tensor, state: Any) -> torch.Tensor:
        at = torch.tensor([[state["at"]]])
        state["at"] += 1
        for module, masked in zip(modules, state["masked"], strict=True):
            module.masked_key_indices = masked
        return model(token, past_key_values=state["cache"], position_ids=at, logits_to_keep=1).logits[:, -1]

    return Contestant(start, step, lambda state: tensors_bytes(*[(x.keys, x.values) for x in state["cache"].layers]))


def main() -> None:
    """Run the job."""
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    presses = {
        "transformers (kvpress)": None,
        "kvpress snapkv 20 %": SnapKVPress(0.8),
        "kvpress expected attention 20 %": ExpectedAttentionPress(0.8),
        "kvpress adakv 25 %": AdaKVPress(ExpectedAttentionPress(0.75, epsilon=1e-2)),
    }
    rows = {name: contestant(model, press) for name, press in presses.items()}
    scores = {name: found(c, job["needle"], tokenizer.decode) for name, c in rows.items()}
    timed = {str(len(ids)): race(rows, torch.tensor([ids]), job["rounds"]) for ids in job["prompts"]}
    print(json.dumps({"version": f"transformers {transformers.__version__}", "needle": scores, "timed": timed}))


if __name__ == "__main__":
    main()
