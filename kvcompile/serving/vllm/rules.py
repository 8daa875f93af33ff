"""How many tokens of a prompt stay in blocks: functions of its length alone, so that no process has to tell another.

A prompt of n tokens lies in blocks of B, token t in slot t. What a head keeps moves to the last slots of the prompt,
[n - kept, n), and the blocks before them are free, as under a sliding window. With kept = n (mod B) these are whole
blocks, and every token t >= n has the slot that it has in stock vLLM.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from kvcompile.plan.plan import LayerPlan, Plan
from kvcompile.plan.selection import Selection, Uniform

SHORTEST_LAST_CHUNK = 2  # tokens: one alone looks like a decode step, whose recorded graph would not compact


@dataclass(frozen=True)
class PromptRule:
    """What a class of layers keeps of a prompt: one KV-cache group of vLLM, one block table.

    selection: of these layers. places: which of the `count` layers that share an allocation they are; they all keep
    what these places get on average.
    """

    selection: Selection
    places: tuple[int, ...] = (0,)
    count: int = 1

    def target(self, tokens: int) -> int:
        """Tokens per head that the plan wants of a prompt of `tokens`, before blocks are whole."""
        budget, floor = self.selection.resolve(tokens)
        allocation = self.selection.allocation
        each = [allocation.static(place, self.count, 1, budget, tokens, floor) for place in self.places]
        return -(-sum(kept[0] for kept in each if kept is not None) // len(self.places))

    def kept(self, tokens: int, block: int) -> int:
        """Tokens per head that stay: the fewest, `target` at least, that leave whole blocks of `block` tokens free."""
        return tokens - self.gap(tokens, block) * block

    def gap(self, tokens: int, block: int) -> int:
        """Blocks at the head of a prompt of `tokens` that are free once it is read."""
        return _gap(self, tokens, block)

    def reach(self, tokens: int, block: int) -> int:
        """Tokens at the head of a prompt whose blocks other requests may share: those that nothing will overwrite."""
        return self.gap(tokens, block) * block or tokens

    @property
    def last_chunk(self) -> int:
        """The fewest tokens that the last chunk of a prompt must have, for the score to see the queries it needs."""
        needs = self.selection.score.needs
        return max(SHORTEST_LAST_CHUNK, needs.queries or 0)

    @property
    def remembers(self) -> bool:
        """Whether the score counts every query, so that something of each has to stay until the prompt ends."""
        needs = self.selection.score.needs
        return needs.carries or needs.moments > 0

    @property
    def turns(self) -> bool:
        """Whether the score turns queries back, or on."""
        needs = self.selection.score.needs
        return needs.moments > 0 or needs.rotation > 0


@functools.lru_cache(maxsize=65536)
def _gap(rule: PromptRule, tokens: int, block: int) -> int:
    return max(0, tokens - rule.target(tokens)) // block


def chunk(start: int, length: int, prompt: int, last: int) -> int:
    """How many of `length` tokens that a step could read from `start` on it reads; 0: it waits.

    A chunk ends at the end of the prompt, so that an answer that is read again sees the compacted prompt, as when it
    was written. What is left of the prompt behind it are `last` tokens or more, or none.
    """
    left = prompt - start
    if left <= 0:
        return length
    if length >= left:
        return left
    return min(length, max(0, left - last))


def rules(plan: Plan, classes: int) -> tuple[PromptRule | None, ...]:
    """The rule of each layer of a plan that `served.refuse` let pass; None: it keeps everything.

    classes: into how many classes an allocation that falls with depth is cut, in order of the layers.
    """
    return tuple(_rule(plan, p, classes) for p in plan.layers)


def _rule(plan: Plan, p: LayerPlan, classes: int) -> PromptRule | None:
    if p.selection is None:
        return None
    if p.selection.allocation == Uniform():
        return PromptRule(p.selection)
    place, count = plan.rank(p.index)
    own = place * classes // count
    return PromptRule(p.selection, tuple(i for i in range(count) if i * classes // count == own), count)


def remembers(served: Sequence[PromptRule | None]) -> bool:
    """Whether a layer counts every query of a prompt, so that none may be taken as read from another request."""
    return any(rule is not None and rule.remembers for rule in served)


def last_chunk(served: Sequence[PromptRule | None]) -> int:
    """The fewest tokens that the last chunk of a prompt must have for all layers."""
    return max((rule.last_chunk for rule in served if rule is not None), default=1)
