"""The C++ texts of the two halves of a decoder layer: f(dtype, weights, norms, activation); sizes are arguments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvcompile.kernels.cpp import simd
from kvcompile.kernels.layers import AfterAttention, BeforeAttention, Norm
from kvcompile.kernels.names import WEIGHTS

TYPES = {"float32": "float", "bfloat16": "bf16"}
PRODUCTS = {**TYPES, "float16": "fp16"}  # where one linear layer runs by itself
KINDS = {None: "NONE", "rms": "RMS", "rms_plus_one": "RMS_PLUS_ONE", "layer": "LAYER"}
ACTIVATIONS = {
    "silu": "  return x * sigmoid(x);\n",
    "gelu": """\
  float part[16];
  store(part, x);
  for (int i = 0; i < 16; i++) part[i] = 0.5f * part[i] * (1.0f + std::erf(part[i] * 0.7071067811865476f));
  return load(part);
""",
    "gelu_tanh": """\
  F inner = set(0.7978845608028654f) * mul_add(x * x * x, set(0.044715f), x);
  return set(0.5f) * x * (set(1.0f) + tanh(inner));
""",
    "relu": "  return max(x, zero());\n",
    "relu_squared": "  F positive = max(x, zero());\n  return positive * positive;\n",
}


@dataclass(frozen=True)
class BeforeSpec:
    """What the kernel before attention is generated from. weights: `floats`, or one of `kernels.names.WEIGHTS`."""

    dtype: str
    weights: str
    norm: str
    head_norm: str | None

    @classmethod
    def of(cls, layer: BeforeAttention) -> BeforeSpec:
        """That of a layer."""
        norms = [part.norm for part in layer.parts if part.norm is not None]
        return cls(*layer.parts[0].linear.kind, layer.norm.kind, norms[0].kind if norms else None)

    def text(self) -> str:
        """The whole C++ text."""
        kinds = _kinds(NORM=self.norm, HEAD_NORM=self.head_norm)
        return prelude(self.dtype, self.weights) + kinds + _file("before")


@dataclass(frozen=True)
class AfterSpec:
    """What the kernel behind attention is generated from."""

    dtype: str
    weights: str
    norm: str
    output_norm: str | None
    down_norm: str | None
    activation: str
    gated: bool

    @classmethod
    def of(cls, layer: AfterAttention) -> AfterSpec:
        """That of a layer."""
        (dtype, weights), norm = layer.output.kind, layer.norm.kind
        behind = _kind(layer.output_norm), _kind(layer.down_norm)
        return cls(dtype, weights, norm, *behind, layer.activation, layer.gate is not None)

    def text(self) -> str:
        """The whole C++ text."""
        kinds = _kinds(NORM=self.norm, OUTPUT_NORM=self.output_norm, DOWN_NORM=self.down_norm)
        gated = f"constexpr bool GATED = {str(self.gated).lower()};\n"
        activation = f"KV_INLINE F activation(F x) {{\n{ACTIVATIONS[self.activation]}}}\n"
        return prelude(self.dtype, self.weights) + kinds + gated + SIGMOID + activation + _file("after")


def linear_text(dtype: str, weights: str) -> str:
    """The whole C++ text of one linear layer with weights in few bits."""
    return prelude(dtype, weights) + _file("linear")


SIGMOID = """\
KV_INLINE F sigmoid(F x) {
  F e = exp2_negative(max(x, zero() - x) * set(-1.442695041f));  // exp(-|x|)
  return if_less(x, zero(), e, set(1.0f)) / (set(1.0f) + e);
}
"""


def prelude(dtype: str, weights: str) -> str:
    """What comes before either: vectors, norms, and products with weights of that kind."""
    name, bits = PRODUCTS[dtype], WEIGHTS.get(weights)
    products = Path(simd.__file__).with_name("products.h").read_text("utf-8")
    kind = "typedef T W;" if bits is None else f"typedef uint8_t W;\nconstexpr int BITS = {bits};"
    columns = _file("floats" if bits is None else "few_bits")
    return (
        f"{simd.prelude()}\ntypedef {name} T;\n#define T_IS_{name.upper()}\n{kind}\n\n"
        f"{products}\n{_file('rows')}\n{columns}\n"
    )


def _kinds(**names: str | None) -> str:
    return "".join(f"constexpr Formula {name} = {KINDS[kind]};\n" for name, kind in names.items())


def _kind(norm: Norm | None) -> str | None:
    return None if norm is None else norm.kind


def _file(name: str) -> str:
    return Path(__file__).with_name(f"{name}.h").read_text("utf-8")
