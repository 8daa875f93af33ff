"""The linear layers of a decode step: right for any size, and F.linear wherever the kernel is not meant."""

from __future__ import annotations

import copy
import io
import platform
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_ids, tiny_model
from torch import Tensor, nn

from kvcompile.kernels.cpp import build, lower
from kvcompile.kernels.cpp import linear as cpp

pytestmark = pytest.mark.skipif(build.available() is not None, reason=f"no compiler: {build.available()}")

X86 = platform.machine() in ("x86_64", "AMD64")
PATHS = {"avx2": ("-march=haswell",), "portable": ("-march=x86-64",)} if X86 else {}
# Sums of K products of unit variance in fp32, rounded once to the dtype of the result: half a unit of its last place.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


def check(y: Tensor, true: Tensor, inner: int) -> None:
    """Relative to the result, or, where products cancel, to the size of a sum of `inner` of them."""
    bound = ROUNDING[y.dtype] * true.abs() + 2e-6 * inner**0.5
    assert (y.double() - true).abs().sub(bound).max() <= 0


def layer(inner: int, features: int, bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Linear:
    module = nn.Linear(inner, features, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    assert lower.lower(module) == 1
    return module


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every call of the kernel."""
    seen: list[int] = []

    real = cpp.kernel
    monkeypatch.setattr(cpp, "kernel", lambda dtype: lambda *a: (seen.append(a[4]), real(dtype)(*a))[1])
    return seen


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 8),
    inner=st.integers(1, 200),
    features=st.integers(1, 70),
    bias=st.booleans(),
    dtype=st.sampled_from(list(cpp.TYPES)),
)
def test_any_size(m: int, inner: int, features: int, bias: bool, dtype: torch.dtype) -> None:
    kernel = cpp.kernel(dtype)
    x, w = torch.randn(m, inner).to(dtype), torch.randn(features, inner).to(dtype)
    b = torch.randn(features).to(dtype) if bias else None
    y = torch.full((m + 1, features), 7.0, dtype=dtype)
    kernel(x.data_ptr(), w.data_ptr(), None if b is None else b.data_ptr(), y.data_ptr(), m, inner, features, 1)
    check(y[:m], exact(x, w, b), inner)
    assert (y[m] == 7).all(), "wrote past the last row"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_path_of_this_cpu(path: str, dtype: torch.dtype) -> None:
    if build.toolchain().simd not in ("AVX-512", "AVX2"):
        pytest.skip("this CPU has no AVX2")
    kernel = cpp.load(cpp.source(dtype, (1, 3, 8)), PATHS[path])
    for m in (1, 3, 8):
        for inner, features in ((1, 1), (37, 29), (96, 64), (130, 7)):
            x, w = torch.randn(m, inner).to(dtype), torch.randn(features, inner).to(dtype)
            y = torch.empty(m, features, dtype=dtype)
            kernel(x.data_ptr(), w.data_ptr(), None, y.data_ptr(), m, inner, features, 2)
            check(y, exact(x, w, None), inner)


@pytest.mark.parametrize("dtype", cpp.TYPES)
def test_a_row_does_not_depend_on_its_batch_or_the_threads(dtype: torch.dtype, calls: list[int]) -> None:
    module = layer(576, 200, bias=True, dtype=dtype)
    x = torch.randn(8, 576).to(dtype)
    before = torch.get_num_threads()
    with torch.inference_mode():
        alone = torch.cat([module(x[i : i + 1]) for i in range(8)])
        check(alone, exact(x, module.weight, module.bias), 576)
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                for m in range(1, 9):
                    assert torch.equal(module(x[:m]), alone[:m]), (threads, m)
        finally:
            torch.set_num_threads(before)
    assert len(calls) == 8 + 24


def test_infinities_and_nan_pass_through() -> None:
    module = layer(20, 6)
    with torch.inference_mode():
        x = torch.randn(1, 20)
        x[0, 19] = float("nan")
        assert module(x).isnan().all()
        module.weight[2, 3] = float("inf")
        x = torch.ones(1, 20)
        assert module(x).isinf().sum() == 1


def test_the_shape_of_the_input_is_kept(calls: list[int]) -> None:
    module = layer(12, 5, bias=True)
    with torch.inference_mode():
        for shape in ((12,), (1, 12), (2, 3, 12), (1, 1, 1, 12)):
            x = torch.randn(shape)
            y = module(x)
            assert y.shape == (*shape[:-1], 5)
            check(y, exact(x, module.weight, module.bias), 12)
        strided = torch.randn(2, 7, 12)[:, -1:]
        assert not strided.is_contiguous()
        check(module(strided), exact(strided, module.weight, module.bias), 12)
    assert calls == [1, 1, 6, 1, 2]


def test_what_the_kernel_is_not_meant_for_takes_torch(calls: list[int]) -> None:
    module, x = layer(12, 5, bias=True), torch.randn(2, 12)
    with torch.inference_mode():
        for odd in (torch.randn(9, 12), torch.randn(0, 12)):
            assert torch.equal(module(odd), F.linear(odd, module.weight, module.bias))
        double = copy.deepcopy(module).double()
        assert torch.equal(double(x.double()), F.linear(x.double(), double.weight, double.bias))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert module(x).dtype == torch.bfloat16
        turned = copy.deepcopy(module)
        turned.weight = nn.Parameter(torch.randn(12, 5).t())
        assert torch.equal(turned(x), F.linear(x, turned.weight, turned.bias))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            module(torch.randn(2, 11))
        with pytest.raises(RuntimeError, match="same dtype"):
            module(x.to(torch.bfloat16))
    assert module.to("meta")(x.to("meta")).is_meta
    assert calls == []


def test_gradients_are_those_of_nn_linear(calls: list[int]) -> None:
    module, x = layer(12, 5, bias=True), torch.randn(2, 12, requires_grad=True)
    plain = nn.Linear(12, 5)
    plain.load_state_dict(module.state_dict())
    module(x).square().sum().backward()
    mine, x.grad = x.grad, None
    plain(x).square().sum().backward()
    assert torch.equal(mine, x.grad)
    assert torch.equal(module.weight.grad, plain.weight.grad)
    assert calls == []
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    assert not module(x.detach()).requires_grad
    assert calls == [2], "frozen weights need no gradient"


def test_tracing_sees_a_linear_layer(calls: list[int]) -> None:
    """A traced kernel would be a constant, the memory of a fake tensor none at all."""
    module, x = layer(12, 5), torch.randn(2, 12)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    program = torch.export.export(module, (x,))
    other = torch.randn(2, 12)
    assert torch.equal(program.module()(other), F.linear(other, module.weight))
    assert calls == []


def test_the_weight_may_move(calls: list[int]) -> None:
    module = layer(12, 5)
    with torch.inference_mode():
        x = torch.randn(1, 12)
        module(x)
        module.weight.data = torch.randn(5, 12)
        check(module(x), exact(x, module.weight, None), 12)
        module.to(torch.bfloat16)
        check(module(x.bfloat16()), exact(x.bfloat16(), module.weight, None), 12)
    assert calls == [1, 1, 1]


def test_lowering_changes_nothing_but_the_forward(calls: list[int]) -> None:
    plain, model = tiny_model("qwen2", tie_word_embeddings=True), tiny_model("qwen2", tie_word_embeddings=True)
    names = list(model.state_dict())
    pointers = [p.data_ptr() for p in model.parameters()]
    modules = [m for m in model.modules() if type(m) is nn.Linear]
    assert lower.lower(model) == len(modules) > 0
    assert lower.lower(model) == 0, "a second time there is nothing left to do"
    assert list(model.state_dict()) == names
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(isinstance(m, nn.Linear) for m in modules)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.inference_mode():
        ids = tiny_ids(2, 3)
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    assert len(calls) == len(modules)


def test_subclasses_of_linear_are_left_alone() -> None:
    class Own(nn.Linear):
        pass

    assert lower.lower(nn.Sequential(Own(4, 4), nn.LayerNorm(4), nn.Linear(4, 4, dtype=torch.float64))) == 0


def test_one_thread_does_not_replace_many(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = replace(build.toolchain(), openmp=None, note="no OpenMP")
    monkeypatch.setattr(build, "toolchain", lambda: alone)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert lower.lower(nn.Linear(4, 4)) == 0
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert lower.lower(nn.Linear(4, 4)) == 1


def test_copies_and_pickles() -> None:
    module, x = layer(12, 5, bias=True), torch.randn(2, 12)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(module), torch.load(buffer, weights_only=False)):
        assert other.forward.args == (other,), "it computes with its own weight"
        with torch.inference_mode():
            assert torch.equal(other(x), module(x))


def test_a_parametrized_weight_is_computed(calls: list[int]) -> None:
    module, x = layer(12, 5), torch.randn(2, 12)
    torch.nn.utils.parametrizations.weight_norm(module)
    with torch.inference_mode():
        torch.testing.assert_close(module(x), F.linear(x, module.weight))


def test_two_threads_at_once(calls: list[int]) -> None:
    import threading

    module = layer(300, 200)
    x = torch.randn(20, 1, 300)
    with torch.inference_mode():
        true = [module(row) for row in x]
    wrong: list[int] = []

    def work() -> None:
        with torch.inference_mode():
            wrong.extend(i for _ in range(20) for i, row in enumerate(x) if not torch.equal(module(row), true[i]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
