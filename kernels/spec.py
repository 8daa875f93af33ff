"""What an attention kernel must know ahead of time: layouts, number formats and shapes, never a policy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from kvcompile.plan.storage import Codec


@dataclass(frozen=True)
class Part:
    """One stretch of every row: how it is addressed and what its keys and values are held in.

    layout: `dense` (rows at a fixed stride), `ragged` (each row has a start) or `paged` (pages of `page` tokens).
    """

    layout: str
    key: Codec
    value: Codec
    page: int = 0

    @property
    def name(self) -> str:
        """Readable: `ragged-int4c32_int4t`, `paged16-float32`."""
        kinds = self.key.name if self.key == self.value else f"{self.key.name}_{self.value.name}"
        return f"{self.layout}{self.page or ''}-{kinds}"


@cache
def plain(layout: str, dtype: object, page: int = 0) -> tuple[Part, ...]:
    """The one part of rows that are held in one float type (a torch dtype or its name)."""
    codec = Codec(str(dtype).removeprefix("torch."))
    return (Part(layout, codec, codec, page),)


@dataclass(frozen=True)
class KernelSpec:
    """One specialised attention kernel: everything here may be compiled in, everything else is an argument.

    A row of the cache is its entries in `parts[0]`, then those in `parts[1]`, and so on (codes and their
    full-precision residual, or two precision tiers); one softmax runs over all of them.
    `scores`: column sums of attention come too.
    `latent`: values have no memory of their own, they are the last `value_dim` channels of the keys (MLA).
    `chunked`: the window does not slide, it begins at multiples of its length.

    The variant of attention is what makes a logit out of q . k, and what weighs beside the entries:

    s_j = softcap(q . k_j * scale) + b_j + m_h (p_j - p),   w_j = exp(s_j) / (exp(sink_h) + sum_k exp(s_k))

    `softcap`: logits are capped. `bias`: each entry of the view has a b_j. `sink`: each query head brings a learned
    logit, whose weight goes to no value. `alibi`: each query head brings a slope m_h, by which logits fall with the
    distance of true positions; `rounded`: by m_h / scale times p_j in bfloat16. Without these b_j and m_h are 0 and the
    sink's term is missing.
    """

    parts: tuple[Part, ...]
    group: int  # query heads per KV head
    head_dim: int
    value_dim: int
    scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    scores: bool = False
    latent: bool = False
    sink: bool = False
    bias: bool = False
    alibi: bool = False
    rounded: bool = False
    chunked: bool = False

    @property
    def name(self) -> str:
        """Readable and unique up to `scale`: `dense-float32-g3-d64`."""
        dims = f"d{self.head_dim}" + (f"v{self.value_dim}" if self.value_dim != self.head_dim else "")
        extras = [f"-{'chunk' if self.chunked else 'w'}{self.sliding_window}"] if self.sliding_window else []
        extras += [f"-cap{self.softcap:g}"] if self.softcap else []
        extras += ["-scores"] if self.scores else []
        extras += ["-latent"] if self.latent else []
        extras += ["-sink"] if self.sink else []
        extras += ["-bias"] if self.bias else []
        extras += ["-alibi"] if self.alibi else []
        extras += ["-rounded"] if self.rounded else []
        return "+".join(p.name for p in self.parts) + f"-g{self.group}-{dims}" + "".join(extras)
