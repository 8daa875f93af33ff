"""llama.cpp through its Python binding, on the GGUF that the default model comes from: an outside reference line.

    pip install llama-cpp-python     # its own venv; called by benchmarks/peers.py --llama <that python>

Its weights are 4 to 8 bits and its cache is float16, so it reads far fewer bytes: no like for like.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

from llama_cpp import Llama


def main() -> None:
    """Run the job."""
    job = json.load(sys.stdin)
    timed = {}
    for ids in job["prompts"]:
        llama = Llama(
            model_path=job["gguf"],
            n_ctx=len(ids) + job["tokens"] + 8,
            n_threads=job["threads"],
            n_threads_batch=job["threads"],
            verbose=False,
        )
        begin = time.perf_counter()
        llama.eval(ids)
        prefill = time.perf_counter() - begin
        steps = []
        for _ in range(job["tokens"]):
            token = llama.sample(temp=0.0)
            begin = time.perf_counter()
            llama.eval([token])
            steps.append(time.perf_counter() - begin)
        timed[str(len(ids))] = {
            "llama.cpp (GGUF weights, fp16 cache)": {
                "prefill s": prefill,
                "decode ms": 1000 * statistics.median(steps),
                "cache MB": job["kv_elements"] * len(ids) * 2 / 1e6,
            }
        }
        del llama
    print(json.dumps({"timed": timed}))


if __name__ == "__main__":
    main()
