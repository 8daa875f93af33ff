"""The budget of a stack for a number of bytes: the largest that fits, found in its plan, without weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import Plan
from kvcompile.searching.stack import FIT, Stack
from kvcompile.stack import apply_stack
from kvcompile.stores.base import POSITION_TYPE

if TYPE_CHECKING:
    from kvcompile.plan.policy import Policy

BYTES = "bfloat16"  # the cache that shares are of
PARTS = 1000  # a budget is so many thousandths of the tokens


@dataclass(frozen=True)
class Sizes:
    """Bytes in bfloat16 after a prompt: held with scales and indices, true positions beside them, and uncompressed."""

    held: int
    positions: int
    dense: int

    @property
    def share(self) -> Fraction:
        """Of the uncompressed bytes."""
        return Fraction(self.held + self.positions, self.dense)


@dataclass(frozen=True)
class Fitter:
    """Plans stacks on a model for prompts of `tokens` tokens.

    A share is that of the bytes of the uncompressed cache in bfloat16, whatever the model runs in: keys, values, scales
    and indices, and the true position of each entry, which the uncompressed cache does not hold.

    Attributes:
        architecture: the model's configuration.
        tokens: of a prompt.
    """

    architecture: Any
    tokens: int

    @cached_property
    def identity(self) -> Plan:
        """The model as it is."""
        from kvcompile.adapters.architectures import describe

        return describe(self.architecture, BYTES)

    def share(self, stack: Stack) -> Fraction:
        """Bytes held after a prompt, as a share. Raises KvcompileError for a stack that cannot be on this model."""
        return self._share(stack.policies())

    def sizes(self, stack: Stack) -> Sizes:
        """The same, in bytes."""
        return self._sizes(stack.policies())

    def _share(self, policies: Iterable[Policy]) -> Fraction:
        return self._sizes(policies).share

    def _sizes(self, policies: Iterable[Policy]) -> Sizes:
        from kvcompile.adapters.architectures import require_turnable

        plan = apply_stack(self.identity, policies)
        require_turnable(plan, self.architecture)
        layers = plan.bytes(1, self.tokens)
        return Sizes(
            sum(layer.bytes + layer.index_bytes for layer in layers),
            sum(layer.kept_total for layer in layers) * POSITION_TYPE.itemsize,
            sum(layer.dense_bytes for layer in layers),
        )

    def fitted(self, stack: Stack, most: Fraction) -> tuple[Stack, Fraction]:
        """The stack with the largest budget whose share is at most `most`, and that share.

        A stack without a budget to be solved is taken as it is.
        Raises KvcompileError for a stack that cannot be on this model, OverBytes for one that holds more at the least.
        """
        if not stack.fits:
            return stack, self._within(stack, self.share(stack), most)
        whole = stack.filled(1.0).policies()
        self._share(whole)  # what cannot be whole cannot be at all
        low, high = 1, PARTS
        while low < high:
            middle = (low + high + 1) // 2
            try:
                fits = self._share(_at(stack, whole, middle / PARTS)) <= most
            except KvcompileError:
                fits = True  # less than what always stays: only more can help
            low, high = (middle, high) if fits else (low, middle - 1)
        chosen = stack.filled(low / PARTS)
        return chosen, self._within(chosen, self.share(chosen), most)

    def _within(self, stack: Stack, share: Fraction, most: Fraction) -> Fraction:
        if share > most:
            raise OverBytes(stack, share, most)
        return share


def _at(stack: Stack, policies: Iterable[Policy], budget: float) -> Iterator[Policy]:
    """The policies of a stack at another budget; they are not made again from their options, which takes longer."""
    for policy in policies:
        solved = [key for key, value in stack.options[policy.name].items() if value == FIT]
        yield replace(policy, **dict.fromkeys(solved, budget))


class OverBytes(KvcompileError):
    """A stack that holds too much however small its budget. share: of the bytes, at the least."""

    def __init__(self, stack: Stack, share: Fraction, most: Fraction) -> None:
        names = ", ".join(stack.options)
        super().__init__(
            f"{names}: at most {as_part(most)} of the bfloat16 bytes may be held", f"{as_part(share)} at the least"
        )
        self.share = share


def as_part(share: Fraction | float) -> str:
    """`1/24.0`: a share as what it is one part of."""
    return f"1/{1 / float(share):.1f}" if share > 0 else "0"
