"""Recipes and budgets swept from a Hydra application of your own: kvcompile composes its own settings inside it.

    python examples/hydra_sweep.py -m recipe=snapkv,adakv budget=0.5,0.25

`model=` takes a folder or a hub id of any model that kvcompile knows.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import hydra
import torch
from hydra.core.config_store import ConfigStore
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcompile


@dataclass
class Job:
    """One job of the application; these are its settings, not kvcompile's."""

    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"  # folder or hub id
    recipe: str = "snapkv"
    budget: float = 0.25
    prompt: str = "The quick brown fox jumps over the lazy dog. " * 100
    new: int = 20


ConfigStore.instance().store(name="job", node=Job)


@hydra.main(version_base=None, config_name="job", config_path=None)
def main(job: Job) -> None:
    """Compile, generate, print one row."""
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    model = AutoModelForCausalLM.from_pretrained(job.model)
    model = kvcompile.compile(model, recipe=job.recipe, overrides=[f"budget={job.budget}"], tokenizer=tokenizer)
    inputs = tokenizer(job.prompt, return_tensors="pt")
    with torch.no_grad():
        began = time.perf_counter()
        out = model.generate(**inputs, max_new_tokens=job.new, do_sample=False, return_dict_in_generate=True)
    seconds, held = time.perf_counter() - began, out.past_key_values.nbytes() / 2**20
    print(f"{job.recipe:20} budget {job.budget:<6} {held:8.2f} MiB of cache held  {seconds:6.2f} s")


if __name__ == "__main__":
    main()
