"""One export, run where kvcompile is not: called by benchmarks/exports.py. Needs numpy and what runs the export."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Step = Callable[[Any], Any]  # token ids [1, Q] to logits [1, 1 or Q, vocabulary], the cache kept in between


def run_hf(folder: str) -> Step:
    """A checkpoint under transformers."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    model, cache = AutoModelForCausalLM.from_pretrained(folder).eval(), DynamicCache()

    @torch.no_grad()
    def step(ids: Any) -> Any:
        return model(torch.from_numpy(ids), past_key_values=cache, logits_to_keep=1).logits.float().numpy()

    return step


def run_gguf(folder: str) -> Step:
    """A file under llama.cpp, its cache in float32."""
    from llama_cpp import Llama

    given = {"n_threads": threads(), "n_threads_batch": threads(), "type_k": 0, "type_v": 0}
    llama = Llama(f"{folder}/model.gguf", n_ctx=4096, verbose=False, **given)

    def step(ids: Any) -> Any:
        llama.eval(ids[0].tolist())
        return np.ctypeslib.as_array(llama._ctx.get_logits(), (llama.n_vocab(),)).copy()[None, None]

    return step


def run_gguf_in_transformers(folder: str) -> Step:
    """A file under transformers, which makes floats of it."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32).eval()
    cache = DynamicCache()

    @torch.no_grad()
    def step(ids: Any) -> Any:
        return model(torch.from_numpy(ids), past_key_values=cache, logits_to_keep=1).logits.numpy()

    return step


def run_torch(folder: str) -> Step:
    """Exported programs with the cache inside."""
    import torch

    prefill, decode = (torch.export.load(f"{folder}/{name}.pt2").module() for name in ("prefill", "decode"))
    decode.load_state_dict(prefill.state_dict(), strict=False, assign=True)

    @torch.no_grad()
    def step(ids: Any) -> Any:
        return (decode if ids.shape[1] == 1 else prefill)(torch.from_numpy(ids)).numpy()

    return step


def run_aoti(folder: str) -> Step:
    """Compiled packages that are handed the cache."""
    import torch

    prefill, decode = (torch._inductor.aoti_load_package(f"{folder}/{name}.pt2") for name in ("prefill", "decode"))
    cache: list[Any] = []

    @torch.no_grad()
    def step(ids: Any) -> Any:
        if ids.shape[1] == 1:
            return decode(torch.from_numpy(ids), *cache).numpy()
        logits, *cache[:] = prefill(torch.from_numpy(ids))
        return logits.numpy()

    return step


def run_onnx(folder: str) -> Step:
    """A graph under onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()
    session = onnxruntime.InferenceSession(f"{folder}/model.onnx", options, providers=["CPUExecutionProvider"])
    _, heads, _, dim = session.get_inputs()[1].shape
    cache = {x.name: np.zeros((1, heads, 0, dim), np.float32) for x in session.get_inputs()[1:]}

    def step(ids: Any) -> Any:
        logits, *present = session.run(None, {"input_ids": ids, **cache})
        cache.update(zip(cache, present, strict=True))
        return logits

    return step


RUNNERS = {
    "hf": run_hf,
    "deepseek": run_hf,
    "gguf": run_gguf,
    "gguf_in_transformers": run_gguf_in_transformers,
    "torch": run_torch,
    "aoti": run_aoti,
    "onnx": run_onnx,
}


def threads() -> int:
    """As many as torch takes."""
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def timed(step: Step, ids: Any, tokens: Any) -> dict[str, Any]:
    """Logits `[n + 1, vocabulary]` after a prompt and after each of the tokens; seconds of each call."""
    logits, taken = [], []
    for piece in (ids, *tokens.reshape(-1, 1, 1)):
        begin = time.perf_counter()
        found = step(piece)
        taken.append(time.perf_counter() - begin)
        logits.append(np.asarray(found)[0, -1])
    return {"logits": np.stack(logits).astype(np.float32), "taken": np.array(taken)}


def main() -> None:
    """Run one export over the prompt and tokens in `given`; write logits and times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("exporter", choices=RUNNERS)
    parser.add_argument("folder")
    parser.add_argument("given", help=".npz with ids [1, T] and tokens [n]")
    parser.add_argument("out", help=".npz")
    args = parser.parse_args()
    given = np.load(args.given)
    run = RUNNERS[args.exporter]
    timed(run(args.folder), given["ids"], given["tokens"][:2])  # the first calls set things up
    np.savez(args.out, **timed(run(args.folder), given["ids"], given["tokens"]))
    if any(name.split(".")[0] == "kvcompile" for name in sys.modules):
        raise SystemExit("kvcompile was imported")


if __name__ == "__main__":
    main()
