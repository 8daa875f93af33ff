"""Serve a model with vLLM whose prompts shrink to a quarter once they are read.

python examples/serve_vllm.py FOLDER, a folder of export=[vllm], where vLLM and kvcompile[vllm] are installed.
"""

from __future__ import annotations

import sys
from typing import Any


def main(folder: str, **options: Any) -> list[str]:
    """The answers to two questions about two texts, read and answered together."""
    from vllm import LLM, SamplingParams

    llm = LLM(model=folder, max_model_len=2048, max_num_seqs=16, **options)
    text = " ".join(f"Room {i} is empty." for i in range(150))
    questions = [f"{text} The key of room {room} is red. What colour is the key?" for room in (7, 70)]
    chats = [[{"role": "user", "content": question}] for question in questions]
    answers = llm.chat(chats, SamplingParams(temperature=0, max_tokens=16))
    return [answer.outputs[0].text for answer in answers]


if __name__ == "__main__":
    for words in main(sys.argv[1]):
        print(words)
