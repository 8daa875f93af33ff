"""Hit rate against its definition, read off transformers' own attention; chance, and heads where nothing matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_ids, tiny_model, tiny_tokenizer

from kvcompile.analysis.attention import Observer
from kvcompile.analysis.hit_rate import HitRate, hit_rates
from kvcompile.analysis.run import analyse
from kvcompile.config.compose import compose
from kvcompile.errors import KvcompileError
from kvcompile.progress import silent

WORDS = " ".join(f"w{4 + (7 * i * i + i) % 120}" for i in range(400))


def run(tmp_path: Path, *overrides: str, model: Any = None) -> Any:
    (tmp_path / "words.txt").write_text(WORDS)
    words = ["analysis=[hit_rate]", f"output={tmp_path / 'out'}", f"prompts.source={tmp_path / 'words.txt'}"]
    options = ["windows=3", "width=8", "generated=2", "budget=5"]
    settings = [*words, "prompts.tokens=50", *(f"analysis.hit_rate.{o}" for o in options), *overrides]
    return analyse(model or tiny_model(), tiny_tokenizer(), compose(settings), silent, lambda line: None)[0]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("heads", ["query", "kv"])
def test_hit_rate_is_its_definition(tmp_path: Path, name: str, heads: str) -> None:
    finding = run(tmp_path, f"analysis.hit_rate.heads={heads}", "prompts.count=1", model=tiny_model(name))
    (prompt,) = finding.result["prompts"]
    assert (prompt["prefix"], prompt["k"], prompt["threshold"]) == (26, 5, 1 / 50)
    model = tiny_model(name)
    model.set_attn_implementation("eager")
    ids = tiny_tokenizer()(WORDS, return_tensors="pt")["input_ids"][:, :50]
    with torch.no_grad():
        options: dict[str, Any] = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        attentions = model(whole, output_attentions=True).attentions
    for layer, full in enumerate(attentions):
        full = full[0].double()
        full = full.unflatten(0, (2, -1)).mean(1) if heads == "kv" else full
        for w in range(3):
            for g in range(2):
                rates = []
                for head in full:
                    votes = head[26 + 8 * w : 34 + 8 * w, :26].mean(0).argsort(descending=True)[:5].tolist()
                    current = head[50 + 8 * g : 58 + 8 * g, :26].mean(0)
                    important = [j for j in range(26) if current[j] > 1 / 50]
                    if important:
                        rates.append(len(set(important) & set(votes)) / len(important))
                expected = sum(rates) / len(rates) if rates else None
                assert prompt["hits"][w][g][layer] == (None if expected is None else pytest.approx(expected))


def test_heads_where_nothing_is_important_are_left_out() -> None:
    voted = torch.tensor([[[0.9, 0.8, 0.1, 0.2]], [[0.1, 0.2, 0.8, 0.9]]])
    important = torch.tensor([[[True, False, True, False]], [[False] * 4]])
    assert hit_rates(voted, important, 2) == [[0.5]]
    assert hit_rates(voted, torch.zeros_like(important), 2) == [[None]]


def test_random_votes_hit_by_chance() -> None:
    torch.manual_seed(0)
    voted, important = torch.rand(200, 1, 100), torch.rand(200, 1, 100) < 0.3
    assert hit_rates(voted, important, 20)[0][0] == pytest.approx(0.2, abs=0.02)


def test_a_model_of_sliding_layers_alone_has_no_rate_for_a_prefix_out_of_sight(tmp_path: Path) -> None:
    finding = run(tmp_path, model=tiny_model("mistral"))  # windows of 16 tokens: nothing generated sees the prefix
    assert {rate for window in finding.result["hits"] for rates in window for rate in rates} == {None}
    assert finding.numbers["hit_rate_last"] is None
    assert (tmp_path / "out" / "hit_rate.png").exists()


def test_generation_is_the_models_own() -> None:
    model, ids = tiny_model(), tiny_ids(1, 20)
    options: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert Observer(model, 5).generate(ids[0].tolist(), 12) == expected[0, 20:].tolist()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prompts.tokens=31"], "hit_rate needs prompts of 32 tokens"),
        (["prompts.tokens=200", "analysis.hit_rate.generated=40"], "the model knows 512 positions"),
    ],
)
def test_prompts_that_are_too_short_or_too_long_are_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(KvcompileError, match=message):
        run(tmp_path, *overrides)
    assert not (tmp_path / "out").exists()


def test_budgets_are_shares_or_numbers() -> None:
    with pytest.raises(KvcompileError, match="budget must be in"):
        HitRate(budget=1.5)
