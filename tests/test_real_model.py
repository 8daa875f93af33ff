"""Claims about the default model, on real text: what each stack still finds, at which measured bytes.

Every prompt is prefilled once, and each stack is applied to a copy of that cache (`analysis.compare.branching`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_table import TABLE, compiled, dense, kept_positions
from tiny import tiny_ids

from kvcompile.adapters.architectures import describe
from kvcompile.analysis.compare.branching import Branching
from kvcompile.build import plan_of
from kvcompile.calibration.probe import ModelCalibrator
from kvcompile.calibration.retrieval import FORMS as CALIBRATED
from kvcompile.compiler import compile_plan
from kvcompile.config.compose import compose
from kvcompile.config.schema import ModelConfig
from kvcompile.errors import KvcompileError
from kvcompile.evaluation.needle import FORMS, NeedleTask
from kvcompile.models.sharing import shared
from kvcompile.plan.plan import Plan

TOKENS, SAMPLES = 1024, 12
LEAST = 1 / 24 / 2  # a 24th of a bfloat16 cache, as a share of a float32 one
UNSEEN = "passcode"  # a needle form that the calibration of retrieval heads does not use
STACKS = {
    "half": ["policy=[adakv]", "stack.adakv.score=expected_attention", "stack.adakv.budget=0.5"],
    "quarter": ["policy=[adakv]", "stack.adakv.score=expected_attention", "stack.adakv.budget=0.25"],
    "heads": ["recipe=retrieval_heads"],
    "stack": ["recipe=snapkv_kivi"],
}


def test_a_branch_in_another_basis_than_the_prefill_is_refused() -> None:
    plan = describe(dense().config, "float32")
    runs = Branching(dense(), rotated=True)
    runs.prefill(tiny_ids(1, 20)[0].tolist())
    assert runs.branch(runs.identity).nbytes() == runs.cache.nbytes()
    with pytest.raises(KvcompileError, match="leave the weights alone"):
        runs.branch(plan)


def generated(model: Any, ids: list[int], count: int) -> tuple[list[int], Any]:
    prompt = torch.tensor([ids])
    with torch.no_grad():
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
    return out.sequences[0, len(ids) :].tolist(), out.past_key_values


@pytest.mark.parametrize("name", TABLE)
def test_a_branch_is_what_compiling_the_stack_gives(name: str) -> None:
    model, ids = compiled(TABLE[name].fields(24)), tiny_ids(1, 60, seed=11)[0].tolist()
    runs = Branching(dense(), rotated=model.kvcompile.plan.layers[0].storage.rotated)
    runs.prefill(ids)
    cache = runs.branch(model.kvcompile.plan)
    tokens, expected = generated(model, ids, 6)
    assert runs.decode(cache, len(tokens)) == tokens
    assert len(tokens) > 1
    held = [[[p for p in row if p < 60] for row in layer] for layer in kept_positions(cache)]
    assert held == [[[p for p in row if p < 60] for row in layer] for layer in kept_positions(expected)]


def steps(model: Any, cache: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(torch.tensor([[i]]), past_key_values=cache).logits[0] for i in ids])


@pytest.mark.parametrize(
    "stack",
    ["quest", "quest,kivi", "clusterkv", "adakv", "leankv", "h2o,offload"],
)
def test_a_branch_goes_on_as_the_stack_itself_does(stack: str) -> None:
    ids = tiny_ids(1, 80, seed=11)[0].tolist()
    sizes = {
        "quest": ["page=4", "sinks=2", "recent=8", "budget=16", "skip_layers=[]"],
        "clusterkv": ["tokens_per_cluster=4", "sinks=2", "recent=8", "budget=16", "skip_layers=[]"],
        "kivi": ["residual=32"],
    }
    small = [f"stack.{name}.{size}" for name in stack.split(",") for size in sizes.get(name, [])]
    config = compose([f"policy=[{stack}]", *small])
    plan = plan_of(dense().config, "float32", config, config.policies())
    runs = Branching(dense())
    runs.prefill(ids[:40])
    runs.extend(ids[40:60])
    cache, model = runs.branch(plan), runs.compiled(plan)
    with torch.no_grad():
        expected = compile_plan(shared(dense()), plan)(torch.tensor([ids[:60]])).past_key_values
    assert [layer.host_bytes_held() for layer in cache.layers] == [x.host_bytes_held() for x in expected.layers]
    assert torch.allclose(steps(model, cache, ids[60:]), steps(model, expected, ids[60:]), atol=1e-5)
    assert runs.cache.nbytes() == runs.branch(runs.identity).nbytes()  # as it was


@dataclass
class Found:
    """Answers and shares of bytes held, one a prompt.

    `contained` is RULER's measure (the answer's digits come in what is said), `exact` that of `evaluation.needle`
    (they are a number of their own: a model that does not stop after them fails).
    """

    contained: list[bool] = field(default_factory=list)
    exact: list[bool] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)


def share(answers: list[bool]) -> float:
    return sum(answers) / len(answers)


@dataclass
class Real:
    """The default model, and the plans of the stacks."""

    model: Any
    tokenizer: Any
    plans: dict[str, Plan]
    runs: Any
    turned: Any  # the same in the Hadamard basis

    def search(self, form: str, samples: int, stacks: list[str]) -> dict[str, Found]:
        """What the dense model and the given stacks answer to the needle prompts of a form."""
        task = NeedleTask(tokens=TOKENS, samples=samples, form=form)
        plans = {"dense": describe(self.model.config, "float32"), **{name: self.plans[name] for name in stacks}}
        found = {name: Found() for name in plans}
        for prompt in task.prompts(self.tokenizer):
            used = {name: self.turned if plan.layers[0].storage.rotated else self.runs for name, plan in plans.items()}
            for runs in {id(runs): runs for runs in used.values()}.values():
                runs.prefill(prompt.ids)
            whole = self.runs.cache.nbytes()
            for name, plan in plans.items():
                cache = used[name].branch(plan)
                found[name].kept.append(cache.nbytes() / whole)
                text = self.tokenizer.decode(used[name].decode(cache, task.max_new_tokens))
                found[name].contained.append(prompt.answer in text)
                found[name].exact.append(prompt.answer in re.findall(r"\d+", text))
        return found


@pytest.fixture(scope="module")
def real(real_model_dir: Path) -> Real:
    from kvcompile.models.loading import load

    model, tokenizer = load(ModelConfig(dtype="float32", device="cpu"))
    calibrator = ModelCalibrator(model, tokenizer, lambda *_: None)
    plans = {}
    for name, overrides in STACKS.items():
        config = compose(overrides)
        policies = tuple(p.calibrated(calibrator) for p in config.policies())
        plans[name] = plan_of(model.config, "float32", config, policies)
    return Real(model, tokenizer, plans, Branching(model), Branching(model, rotated=True))


@pytest.mark.real
def test_a_branch_is_what_compiling_gives_on_the_real_model(real: Real) -> None:
    (prompt,) = NeedleTask(tokens=512, samples=1).prompts(real.tokenizer)
    real.runs.prefill(prompt.ids)
    for name in ("quarter", "heads"):
        plan = real.plans[name]
        tokens, _ = generated(compile_plan(shared(real.model), plan), prompt.ids, 10)
        assert real.runs.decode(real.runs.branch(plan), len(tokens)) == tokens
        assert len(tokens) > 5


@pytest.mark.real
def test_adakv_keeps_the_needle_at_half_and_a_quarter_of_the_bytes(real: Real) -> None:
    found = real.search("magic", SAMPLES, ["half", "quarter"])
    assert sum(found["dense"].exact) >= SAMPLES - 1
    assert sum(found["half"].exact) >= SAMPLES - 1
    assert sum(found["quarter"].contained) >= SAMPLES - 2
    for name, wanted in (("half", 0.5), ("quarter", 0.25)):
        assert all(abs(kept - wanted) <= 0.01 for kept in found[name].kept)


@pytest.mark.real
def test_needles_of_a_form_that_no_calibration_used_are_found(real: Real) -> None:
    """By retrieval heads at 15% of the bytes, and by codes of what SnapKV keeps at a 24th of those of bfloat16."""
    assert UNSEEN not in {form.name for form in CALIBRATED}
    assert not {form.plant for form in CALIBRATED} & {form.needle for form in FORMS.values()}
    found = real.search(UNSEEN, SAMPLES // 2, ["heads", "stack"])
    assert share(found["dense"].exact) >= 0.9
    assert share(found["heads"].exact) >= 0.95 * share(found["dense"].exact)
    assert share(found["stack"].contained) >= 0.95 * share(found["dense"].contained)
    assert max(found["heads"].kept) <= 0.15
    assert max(found["stack"].kept) <= LEAST


@pytest.mark.real
def test_a_twenty_fourth_of_the_bfloat16_bytes_keeps_one_needle_of_two(real: Real) -> None:
    found = real.search("two_keys", SAMPLES // 3, ["stack"])
    assert share(found["stack"].contained) >= 0.95 * share(found["dense"].contained)
    assert max(found["stack"].kept) <= LEAST
