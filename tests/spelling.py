"""A tokenizer that spells: every byte is a token, so that any text can be read, and decoded as it was."""

from __future__ import annotations

import functools

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHAT = "{% for m in messages %}<u>{{ m['content'] | trim }}</u>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


@functools.cache
def spelling(begin: bool = False, chat: bool = False) -> PreTrainedTokenizerFast:
    """begin: a prompt begins with a token of its own. chat: with a template, which trims what is said."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(["<s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", chat_template=CHAT if chat else None)
