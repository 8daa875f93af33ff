"""A decoder layer around its attention, as kernels see it: weights and formulas of what runs before it and behind it.

    before:  z = norm(x);  part_p = turned(head_norm_p(z W_p^T + b_p)),  p of queries, keys, values
    after:   s = x + c norm_a(a W_o^T + b_o);  y = s + c norm_m(h W_d^T + b_d),  h = act(norm(s) W_g^T) (norm(s) W_u^T)

Tensors are the model's own, contiguous, all of one dtype, on one device: kernels keep their addresses. Weights of
linear layers are floats of that dtype, or all in one format of few bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kvcompile.kernels.reference.packed import Packed

NORMS = ("rms", "rms_plus_one", "layer")  # of weight w: w z, (1 + w) z, w z + b, z with unit mean square or variance
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu_squared")
MOST_ROWS = 32


@dataclass(frozen=True, eq=False)
class Norm:
    """One of NORMS over the last dimension; weight and bias may be missing."""

    kind: str
    weight: Tensor | None
    bias: Tensor | None
    eps: float


@dataclass(frozen=True, eq=False)
class Linear:
    """y [m, N] = x [m, K] W^T + b, `weight [N, K]`, `bias [N]` or None."""

    weight: Tensor | Packed
    bias: Tensor | None

    @property
    def kind(self) -> tuple[str, str]:
        """The dtype of x and y, and what the weights are: `floats`, or the name of their format."""
        weights = self.weight.format if isinstance(self.weight, Packed) else "floats"
        return str(self.weight.dtype).removeprefix("torch."), weights


@dataclass(frozen=True, eq=False)
class Part:
    """Queries, keys or values: their projection, the norm of each head (None: none), whether they are turned."""

    linear: Linear
    norm: Norm | None
    turned: bool


@dataclass(frozen=True, eq=False)
class BeforeAttention:
    """What makes queries, keys and values, heads of `head_dim` channels. Head norms are of one kind."""

    norm: Norm
    parts: tuple[Part, ...]
    head_dim: int


@dataclass(frozen=True, eq=False)
class AfterAttention:
    """What follows attention, up to the next layer. `gate` is None in an MLP without; `factor` is c."""

    output: Linear
    norm: Norm
    up: Linear
    down: Linear
    activation: str
    gate: Linear | None = None
    output_norm: Norm | None = None
    down_norm: Norm | None = None
    factor: float = 1.0


# x [B, 1, K], cos and sin [B or 1, 1, width] in float32 (None where nothing is turned): of each part what attention
# reads, then of each part what it is before rotation (None where that was not asked for); all [B, H, 1, D]
Before = Callable[[Tensor, "Tensor | None", "Tensor | None"], "tuple[Tensor | None, ...]"]
# attended [B, 1, A], x [B, 1, K]: y [B, 1, K]
After = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LayerKernels:
    """How a backend runs both halves for up to MOST_ROWS sequences of one new token, without gradients.

    refuses: why it does not for weights of a dtype on this machine, by name of the dtype; None: it does. before: also
    takes which parts are wanted before rotation.
    """

    refuses: Callable[[str], str | None]
    before: Callable[[BeforeAttention, tuple[bool, ...]], Before]
    after: Callable[[AfterAttention], After]
