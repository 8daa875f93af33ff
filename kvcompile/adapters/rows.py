"""What a text stack inside a larger model reads of each token, in one row: its embedding, and what else goes with it.

A prompt is then cut into chunks, padded and counted as one of text alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvcompile.errors import KvcompileError


class Rows(nn.Module):
    """Embeddings `[B, Q, hidden]` alone; called on token ids `[B, Q]`, those of text."""

    def __init__(self, stack: Any) -> None:
        super().__init__()
        self.embedding = stack.get_input_embeddings()
        self.hidden = int(stack.config.hidden_size)

    @property
    def num_embeddings(self) -> int:
        """How many tokens there are."""
        return int(self.embedding.num_embeddings)

    @property
    def weight(self) -> Tensor:
        """The table of embeddings."""
        table: Tensor = self.embedding.weight
        return table

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of text, `[B, Q, hidden]` and what follows."""
        embeddings: Tensor = self.embedding(ids)
        return embeddings

    def joined(self, embeddings: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The rows of what the model around hands to the stack; what is in them is taken out of its `arguments`."""
        return embeddings

    def parted(self, rows: Tensor) -> dict[str, Any]:
        """The arguments that the stack reads rows by."""
        return {"inputs_embeds": rows}


class PerLayer(Rows):
    """A vector of each layer behind the embedding, which token ids alone are looked up for: gemma3n, gemma4."""

    def __init__(self, stack: Any) -> None:
        super().__init__(stack)
        self.layers, self.width = int(stack.config.num_hidden_layers), int(stack.config.hidden_size_per_layer_input)
        object.__setattr__(self, "stack", stack)  # which has these rows within it: no module of theirs

    def forward(self, ids: Tensor) -> Tensor:
        """`[B, Q, hidden + layers * width]`."""
        stack: Any = self.stack
        return torch.cat((self.embedding(ids), stack.get_per_layer_inputs(ids).flatten(2)), -1)

    def joined(self, embeddings: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Raises KvcompileError where embeddings come alone."""
        vectors = arguments.pop("per_layer_inputs", None)
        if vectors is None:
            raise KvcompileError(
                "embeddings come with the vectors that layers are given beside them",
                "inputs_embeds without per_layer_inputs",
                "pass input_ids, or both",
            )
        return torch.cat((embeddings, vectors[:, :, : self.layers].flatten(2).to(embeddings.dtype)), -1)

    def parted(self, rows: Tensor) -> dict[str, Any]:
        """Both of them."""
        vectors = torch.unflatten(rows[..., self.hidden :], -1, (self.layers, self.width))
        return {"inputs_embeds": rows[..., : self.hidden], "per_layer_inputs": vectors}


class Deepstack(Rows):
    """What each of the first layers adds to its output behind the embedding, zero for text: qwen3_vl.

    DeepStack, arXiv 2406.04334: what inner layers of the image model see is added layer by layer.
    """

    def __init__(self, stack: Any, layers: int) -> None:
        super().__init__(stack)
        self.layers = layers
        stack._deepstack_process = _added

    def forward(self, ids: Tensor) -> Tensor:
        """`[B, Q, (1 + layers) * hidden]`."""
        return nn.functional.pad(self.embedding(ids), (0, self.layers * self.hidden))

    def joined(self, embeddings: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Features of image tokens `[tokens, hidden]`, layer by layer, where these tokens are."""
        places, features = arguments.pop("visual_pos_masks", None), arguments.pop("deepstack_visual_embeds", None)
        rows = nn.functional.pad(embeddings, (0, self.layers * self.hidden))
        if features is not None:
            rows[places, self.hidden :] = torch.cat([x.to(rows) for x in features], -1)
        return rows

    def parted(self, rows: Tensor) -> dict[str, Any]:
        """The embedding, and what the layers add."""
        first, *others = (rows[..., i * self.hidden : (i + 1) * self.hidden] for i in range(1 + self.layers))
        return {"inputs_embeds": first, "deepstack_visual_embeds": others}


def _added(states: Tensor, places: None, features: Tensor) -> Tensor:
    """States of all tokens `[B, Q, hidden]`, and what is added to them."""
    return states + features


def rows_of(model: Any, stack: Any) -> Rows:
    """The rows that a text stack reads inside a whole model."""
    if getattr(stack.config, "hidden_size_per_layer_input", 0):
        return PerLayer(stack)
    if hasattr(stack, "_deepstack_process"):
        return Deepstack(stack, len(model.config.vision_config.deepstack_visual_indexes))
    return Rows(stack)
