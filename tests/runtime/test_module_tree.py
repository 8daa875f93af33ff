"""What is done to a compiled model's module tree is what runs, or is refused: adapters, heads, hooks, quantisation."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from tiny import tiny_ids, tiny_model
from torch import Tensor, nn

import kvcompile
from kvcompile.errors import KvcompileError

IDS = tiny_ids(2, 24)


def ours(stack: str = "dense", kernels: str = "sdpa") -> Any:
    """A compiled tiny llama of its own."""
    overrides = [f"policy=[{'' if stack == 'dense' else stack}]", f"kernels={kernels}"]
    return kvcompile.compile(tiny_model(), overrides=overrides)


def logits(model: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **options).logits  # type: ignore[no-any-return]


def adapted(model: Any, names: tuple[str, ...]) -> Any:
    """The model with seeded LoRA beside these projections."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(1)
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=list(names), init_lora_weights=False))


@pytest.mark.parametrize("kernels", ["auto", "sdpa"])
@pytest.mark.parametrize("names", [("v_proj",), ("q_proj", "k_proj", "up_proj")], ids=str)
@pytest.mark.parametrize("stack", ["h2o", "paged", "kivi"])
def test_lora_on_a_compiled_model_counts_and_trains(stack: str, names: tuple[str, ...], kernels: str) -> None:
    """The prompt is not compressed yet while it is read: logits, loss and gradients are the uncompressed model's.

    v_proj alone: where no query needs a gradient, values do, and generated kernels have none.
    """
    original, model = adapted(tiny_model(), names), adapted(ours(stack, kernels), names)
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    labels = IDS.masked_fill(mask == 0, -100)
    losses = [m(input_ids=IDS, attention_mask=mask, labels=labels).loss for m in (original, model)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    for loss in losses:
        loss.backward()
    theirs = {name: p.grad for name, p in original.named_parameters() if p.requires_grad}
    mine = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(mine) == len(theirs) == 2 * len(names) * 4
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-3, atol=1e-4, msg=name)
    torch.testing.assert_close(logits(model), logits(original), rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(tiny_model()), rtol=1e-4, atol=1e-4)


def test_adapters_of_transformers_count() -> None:
    models = tiny_model(), ours()
    plain = logits(models[0])
    for model in models:
        torch.manual_seed(1)
        model.add_adapter(peft.LoraConfig(r=4, target_modules=["o_proj", "down_proj"], init_lora_weights=False))
    expected, got = map(logits, models)
    assert not torch.allclose(expected, plain, atol=0.1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def linear(old: nn.Linear) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(old.in_features, old.out_features, bias=False)


def new_head(model: Any) -> None:
    model.lm_head = linear(model.lm_head)


def new_projection(model: Any) -> None:
    attention = model.model.layers[1].self_attn
    attention.q_proj = linear(attention.q_proj)


def new_mlp(model: Any) -> None:
    model.model.layers[2].mlp = nn.Identity()


def new_embeddings(model: Any) -> None:
    torch.manual_seed(3)
    model.set_input_embeddings(nn.Embedding(200, 64))


def resized(model: Any) -> None:
    torch.manual_seed(3)
    model.resize_token_embeddings(140, mean_resizing=False)


CHANGES = [new_head, new_projection, new_mlp, new_embeddings, resized]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_module_put_in_later_runs(change: Callable[[Any], None]) -> None:
    original, model = tiny_model(), ours()
    for m in (original, model):
        change(m)
    torch.testing.assert_close(logits(model), logits(original), rtol=1e-4, atol=1e-4)
    if change is not resized:
        assert not torch.allclose(logits(model), logits(tiny_model()), atol=0.1)


@pytest.mark.parametrize("kernels", ["auto", "sdpa"])
@pytest.mark.filterwarnings("ignore")  # torch's own: quantize_dynamic is deprecated
def test_quantised_by_torch_after_compiling(kernels: str) -> None:
    """It copies the model, then looks for layers by their class: those with a decode kernel too."""
    quantized = [
        torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, dtype=torch.qint8)
        for m in (tiny_model(), ours(kernels=kernels))
    ]
    expected, got = map(logits, quantized)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, logits(tiny_model()), atol=1e-3)


LEAVES = ["lm_head", "model.embed_tokens", "model.norm", "model.layers.1.mlp", "model.layers.1.self_attn.k_proj"]


@pytest.mark.parametrize("name", LEAVES)
def test_hooks_fire(name: str) -> None:
    """What a hook returns is what the model goes on with."""
    original, model = tiny_model(), ours()
    for m in (original, model):
        m.get_submodule(name).register_forward_hook(lambda module, args, out: out * 0.5)
    torch.testing.assert_close(logits(model), logits(original), rtol=1e-4, atol=1e-4)


HOOKS: dict[str, Callable[[Any], Any]] = {
    "forward": lambda m: m.register_forward_hook(lambda *a: None),
    "pre": lambda m: m.register_forward_pre_hook(lambda *a: None),
    "backward": lambda m: m.register_full_backward_hook(lambda *a: None),
    "patched": lambda m: setattr(m, "forward", m.forward),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name", ["model", "model.layers.2", "model.layers.2.self_attn"])
def test_a_hook_that_would_not_fire_is_refused(name: str, kind: str) -> None:
    model = ours()
    handle = HOOKS[kind](model.get_submodule(name))
    with pytest.raises(KvcompileError, match=rf"{name}.*hook on it would not fire.*remove it") as error:
        logits(model)
    assert "\n" not in str(error.value)
    if handle is not None:
        handle.remove()
        logits(model)


@pytest.mark.parametrize("name", ["model", "model.layers.2", "model.layers.2.self_attn"])
def test_such_a_hook_before_compiling_is_refused_with_nothing_changed(name: str) -> None:
    model = tiny_model()
    handle = model.get_submodule(name).register_forward_hook(lambda *a: None)
    with pytest.raises(KvcompileError, match="hook on it would not fire"):
        kvcompile.compile(model, overrides=["policy=[mqa]"])
    handle.remove()
    assert torch.equal(logits(model), logits(tiny_model()))


def shorter(model: Any) -> None:
    model.model.layers = model.model.layers[:2]


def longer(model: Any) -> None:
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))


def swapped(model: Any) -> None:
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


def other_attention(model: Any) -> None:
    model.model.layers[3].self_attn = nn.Identity()


@pytest.mark.parametrize("change", [shorter, longer, swapped, other_attention], ids=lambda f: f.__name__)
def test_what_the_graph_stands_for_stays(change: Callable[[Any], None]) -> None:
    model = ours()
    change(model)
    with pytest.raises(KvcompileError, match=r"part of the compiled graph.*change the model first"):
        logits(model)


def test_pruned_layers_before_compiling() -> None:
    """A config of other layers is refused by name; with a config to match, the pruned model is what runs."""
    pruned = tiny_model()
    shorter(pruned)
    with pytest.raises(KvcompileError, match=r"as many layers as its config says, 4, got 2.*num_hidden_layers=2"):
        kvcompile.compile(pruned, "knorm")
    pruned.config.num_hidden_layers = 2
    expected = logits(pruned, use_cache=False)
    model = kvcompile.compile(pruned, "knorm", ["kernels=sdpa"])
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["smollm3", "gemma2"])
def test_layers_pruned_to_others_than_the_config_lists(name: str) -> None:
    """The lists by layer of the config still begin with the layers that are gone."""
    pruned = tiny_model(name)
    pruned.model.layers = pruned.model.layers[1:3] if name == "gemma2" else pruned.model.layers[2:]
    pruned.config.num_hidden_layers = 2
    with pytest.raises(KvcompileError, match=r"position embedding must be what the config says.*layer_types"):
        kvcompile.compile(pruned, overrides=["policy=[]", "kernels=sdpa"])


def test_the_base_model_of_a_compiled_model_is_refused() -> None:
    for call in (lambda m: m.model(IDS), lambda m: m.model.layers[0](torch.zeros(1, 3, 64))):
        with pytest.raises(KvcompileError, match="layers of a compiled model run in its graph only"):
            call(ours())


def test_pickling_is_refused_and_copies_work() -> None:
    model = ours("knorm")
    with pytest.raises(KvcompileError, match=r"saved as an artifact, not pickled"):
        pickle.dumps(model)
    twin = copy.deepcopy(model)
    assert twin.kvcompile.graph.model is twin
    new_head(twin)
    new_mlp(copy.copy(copy.deepcopy(model)))
    assert not torch.allclose(logits(twin), logits(model), atol=0.1), "each runs its own tree"
    torch.testing.assert_close(logits(model), logits(tiny_model()), rtol=1e-4, atol=1e-4)
    twin.model.layers[1].register_forward_hook(lambda *a: None)
    logits(model)
    with pytest.raises(KvcompileError, match="would not fire"):
        logits(twin)
