"""A byte-level BPE tokenizer of transformers as the metadata of a GGUF file."""

from __future__ import annotations

import json
from typing import Any

from gguf import GGUFWriter, TokenType

from kvcompile.errors import KvcompileError

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# how text is cut into words, as llama.cpp calls it
PATTERNS = {WORDS.format(""): "qwen2", WORDS.format("{1,3}"): "llama-bpe"}


def pre_tokenizer(tokenizer: Any) -> str:
    """llama.cpp's name of how a tokenizer cuts text into words.

    Raises KvcompileError for a tokenizer that llama.cpp would read otherwise.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {"model": {"type": type(tokenizer).__name__}}
    model, normalizer = rules["model"], (rules.get("normalizer") or {}).get("type")
    if model["type"] != "BPE" or model.get("byte_fallback") or normalizer not in (None, "NFC"):
        kind = f"{model['type']}{' with byte fallback' if model.get('byte_fallback') else ''}, normalizer {normalizer}"
        raise KvcompileError("GGUF files are written with byte-level BPE tokenizers", kind)
    name = _words(rules.get("pre_tokenizer") or {})
    if name is None:
        raise KvcompileError(
            "how the tokenizer cuts words must be known to llama.cpp as gpt-2, smollm, qwen2 or llama-bpe",
            json.dumps(rules.get("pre_tokenizer"))[:200],
        )
    return name


def _words(rule: dict[str, Any]) -> str | None:
    steps = rule.get("pretokenizers", [rule])
    kinds = [step.get("type") for step in steps]
    if kinds[-1:] != ["ByteLevel"] or steps[-1].get("add_prefix_space"):
        return None
    own_words = bool(steps[-1].get("use_regex", True))
    if kinds == ["ByteLevel"] and own_words:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and own_words and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not own_words and steps[0].get("behavior") == "Isolated":
        return PATTERNS.get(steps[0]["pattern"].get("Regex"))
    return None


def add_tokenizer(writer: GGUFWriter, tokenizer: Any, model: Any) -> None:
    """Tokens, merges, special tokens and chat template; without a tokenizer, that there is none."""
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(tokenizer))
    tokens, kinds = _tokens(tokenizer, model.config.vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    for name in ("bos", "eos", "pad", "unk"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(ids) > 1 and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _tokens(tokenizer: Any, size: int) -> tuple[list[str], list[TokenType]]:
    """Text and kind of every row of the embeddings; rows without a token are unused."""
    words = {number: word for word, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens: list[str] = []
    kinds: list[TokenType] = []
    for number in range(size):
        if number in added:
            tokens.append(added[number].content)
            kinds.append(TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED)
        else:
            tokens.append(words.get(number, f"[PAD{number}]"))
            kinds.append(TokenType.NORMAL if number in words else TokenType.UNUSED)
    return tokens, kinds
