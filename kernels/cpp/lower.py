"""Linear layers that run the C++ kernel for the few rows of a decode step, and PyTorch's for everything else."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvcompile.kernels.cpp import build
from kvcompile.kernels.cpp import linear as cpp
from kvcompile.kernels.cpp.layer import few_bits
from kvcompile.kernels.layers import MOST_ROWS
from kvcompile.kernels.reference.packed import PackedLinear


def decode_linear(module: nn.Linear, input: Tensor) -> Tensor:
    """`nn.Linear.forward` that reads the weight at the speed of memory for up to 8 rows.

    y [..., N] = x [..., K] W^T + b, summed in fp32. Rows beyond 8, gradients, autocast, tracing, other devices and
    dtypes, and weights that are not contiguous take `F.linear`. A row's result does not depend on the rows beside it.
    Everything is read anew: `.to()` may have moved the weight.
    """
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None or not _applies(input, weight, bias):
        return F.linear(input, module.weight, module.bias)
    features, inner = weight.shape
    input = input.contiguous()
    result = input.new_empty((*input.shape[:-1], features))
    cpp.kernel(weight.dtype)(
        input.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        result.data_ptr(),
        input.numel() // inner,
        inner,
        features,
        torch.get_num_threads(),
    )
    return result


def decode_packed(module: PackedLinear, input: Tensor) -> Tensor:
    """`PackedLinear.forward` that reads weights in few bits as they lie for up to 32 rows, which it rounds to 8 bits.

    y [..., N] = x [..., K] W^T + b. More rows take `F.linear` with the weights as floats for that call, as do
    gradients, autocast and tracing. A row's result does not depend on the rows beside it.
    """
    packed, bias = module.packed, module._parameters.get("bias")
    if input.dtype is not packed.dtype or not (input.is_cpu and packed.codes.is_cpu) or not _plain(input):
        return PackedLinear.forward(module, input)
    if 0 < input.numel() <= MOST_ROWS * module.in_features and not (torch.is_grad_enabled() and input.requires_grad):
        return few_bits.product(input, packed, bias)
    return F.linear(input, few_bits.floats(packed), bias)


def lower(model: nn.Module) -> int:
    """Give plain `nn.Linear` and `PackedLinear` modules a forward for decode steps, in place; how many there were.

    Modules, their class, parameters and names stay as they are, so state dicts, ties and optimizers hold, and what
    replaces layers by their class (torch's quantisation, adapters) finds them.
    None where torch has several threads and the kernel, for want of OpenMP, would have one.
    Raises KvcompileError where the kernel cannot be compiled.
    """
    if torch.get_num_threads() > 1 and build.toolchain().openmp is None:
        return 0
    own = [module for module in model.modules() if "forward" not in vars(module)]
    linears = [module for module in own if type(module) is nn.Linear and _suits(module.weight)]
    packed = [module for module in own if type(module) is PackedLinear and few_bits.supports(module.packed.dtype)]
    for linear in linears:
        cpp.kernel(linear.weight.dtype)
        vars(linear)["forward"] = partial(decode_linear, linear)
    for module in packed:
        few_bits.prepare(module.packed.dtype, module.format)
        vars(module)["forward"] = partial(decode_packed, module)
    return len(linears) + len(packed)


def lowered(module: nn.Module) -> bool:
    """Whether a module has `decode_linear` or `decode_packed` as its forward."""
    return getattr(vars(module).get("forward"), "func", None) in (decode_linear, decode_packed)


def _suits(weight: Tensor) -> bool:
    return weight.is_cpu and weight.dtype in cpp.TYPES and weight.layout is torch.strided


def _plain(input: Tensor) -> bool:
    """Whether a tensor has memory to read, and nothing watches or rewrites what is done to it."""
    if type(input) is not Tensor or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return not torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]


def _applies(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel takes these tensors as they are; subclasses (fake, quantized) carry no memory to read."""
    if not _plain(input) or type(weight) is not nn.Parameter:
        return False
    count, dtype = input.numel(), weight.dtype
    if not 0 < count <= cpp.MOST_ROWS * weight.shape[1] or input.shape[-1] != weight.shape[1]:
        return False
    if input.dtype is not dtype or dtype not in cpp.TYPES or not (input.is_cpu and weight.is_cpu):
        return False
    if bias is not None and not (bias.dtype is dtype and bias.is_cpu and bias.shape == weight.shape[:1]):
        return False
    if torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad):
        return False
    return weight.is_contiguous() and (bias is None or bias.is_contiguous())
