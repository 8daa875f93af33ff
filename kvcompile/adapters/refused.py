"""The causal-LM types of transformers that are not compiled, each with its reason."""

from __future__ import annotations

_TYPES = {
    "an encoder-decoder, or the decoder of one, whose cross-attention has a cache of its own": (
        "bart bigbird_pegasus blenderbot blenderbot-small marian mbart moshi musicgen musicgen_melody mvp pegasus "
        "plbart prophetnet trocr whisper"
    ),
    "an encoder, which has no KV cache unless it is made a decoder": (
        "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
        "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod"
    ),
    "it has no attention, so no keys and values to compress": "falcon_mamba mamba mamba2 rwkv xlstm",
    "tokens attend in an order, or over a memory, that no KV cache of rows holds": "reformer xlm xlnet",
    "an indexer chooses which entries each token reads, and keeps keys of its own": (
        "axk2 deepseek_v32 deepseek_v4 dots3_note dots3_note_text glm_moe_dsa hy_v4 minimax_m3_vl_text qwen4_exp "
        "qwen4_exp_text"
    ),
    "an image or audio model around a text model, not yet: compile the text model of the same family": (
        "emu3 fuyu got_ocr2 mllama moss_transcribe_diarize phi4_multimodal"
    ),
    "an image model, whose image tokens see each other both ways": "git",
    "a draft model, which reads the cache of the model that it drafts for": (
        "gemma4_assistant gemma4_unified_assistant"
    ),
    "its lightning attention wants a cache class of its own (MiniMaxCache), and no other": "minimax",
    "its layers keep their states in themselves, not in a cache": "recurrent_gemma",
    "its attentions convolve queries, keys and values over tokens, and keep a state beside their cache": "zaya",
    "keys and values are convolved over tokens, and logits get a bias of distance that the query makes": (
        "inkling2_text inkling_text"
    ),
    "scores depend on the distance of tokens by a learned bias": "cpmant",
    "each value is read by two key heads (differential attention), and rows by head would hold it twice": "diffllama",
    "a mask is made of the values of all heads, of which a cache by head drops some": "doge",
    "a token's queries and output go through experts of the attention, which are no projections by head": "jetmoe",
    "its attentions run several times in a pass, each time with a cache of its own": "hrm_text",
    "bytes are joined into patches by another model, and read through cross-attention": "blt",
    "its model replaces its table of positions in every call, which no trace follows": "ctrl",
    "transformers has no KV cache for it": "openai-gpt",
}
REFUSED: dict[str, str] = {name: reason for reason, names in _TYPES.items() for name in names.split()}
