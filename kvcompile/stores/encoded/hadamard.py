"""The Hadamard basis: an orthogonal change of channels that spreads outliers before keys and values are encoded."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def block_of(dim: int) -> int:
    """The largest power of two that divides `dim`: channels that are mixed with one another."""
    return dim & -dim


@functools.cache
def _block(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # whoever asks first: later ones may train with it
        matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
        while matrix.shape[0] < size:
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
        block: Tensor = (matrix / size**0.5).to(device, dtype)
    return block


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _constant(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The block as a graph of torch.compile has it: no step makes it anew, or brings it to a device."""
    return _block(size, dtype, device)


def matrix(dim: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    """H `[D, D]`: Sylvester's Hadamard matrices over sqrt(b) along the diagonal, b = `block_of(dim)`; H = H^T = H^-1.

    Source: QuaRot, arXiv 2404.00456; for head sizes that are no power of two, blocks instead of its larger matrices.
    """
    size = block_of(dim)
    return torch.kron(torch.eye(dim // size, dtype=dtype, device=device), _block(size, dtype, torch.device(device)))


def turn_basis(states: Tensor) -> Tensor:
    """`[..., D]` times H: into the Hadamard basis, and out of it again."""
    block: Tensor = _constant(block_of(states.shape[-1]), states.dtype, states.device)
    return (torch.unflatten(states, -1, (-1, block.shape[0])) @ block).flatten(-2)
