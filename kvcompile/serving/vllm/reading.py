"""What a layer remembers of the prompts that it reads, chunk by chunk: for scores that count every query.

The queries of a step are gone after it. What a score makes of them (moments, or a number per entry) stays, in the
project's own `QueryHistory`, until the prompt ends.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.runtime.history import QueryHistory


@dataclass(frozen=True)
class Chunk:
    """Tokens `[start, stop)` of a prompt, which this step reads: its row in the batch, and its blocks up to `stop`.

    ends: the prompt does so too.
    """

    row: int
    start: int
    stop: int
    ends: bool
    blocks: Tensor

    @property
    def key(self) -> int:
        """Its first block, which no other request has while the prompt is read, as nothing is shared."""
        return int(self.blocks[0])


class Readings:
    """The prompts that one layer is reading, each with what is remembered of it, by its first block.

    A request that is aborted or preempted is never heard of again: what it left is forgotten where a prompt begins in
    its first block, or once so many others have been read from that it is the one left longest.
    """

    def __init__(self) -> None:
        self._histories: OrderedDict[int, QueryHistory] = OrderedDict()

    def __len__(self) -> int:
        return len(self._histories)

    def of(self, chunk: Chunk, most: int) -> QueryHistory:
        """What is remembered of the prompt of a chunk so far; nothing where it begins.

        most: requests that run at once, and so prompts that can be half read.
        Raises KvcompileError where the prompt did not begin here: its first queries were never seen.
        """
        if chunk.start == 0:
            self._histories[chunk.key] = QueryHistory()
        elif chunk.key not in self._histories:
            raise KvcompileError(
                "a score that counts every query must see a prompt from its first token on",
                f"a chunk from token {chunk.start} on, of a prompt whose start was not read",
            )
        self._histories.move_to_end(chunk.key)
        while len(self._histories) > most:
            self._histories.popitem(last=False)
        return self._histories[chunk.key]

    def end(self, block: int) -> QueryHistory:
        """What was remembered of the prompt that begins in `block`, and is no longer."""
        return self._histories.pop(block)
