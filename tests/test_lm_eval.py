"""lm_eval over a compressed cache: log-likelihoods are of decode steps over it, and its command opens artifacts."""

from __future__ import annotations

import importlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from transformers import PreTrainedTokenizerFast

import kvcompile
from kvcompile import cli
from kvcompile.errors import KvcompileError
from kvcompile.evaluation.perplexity import cached_log_likelihood

pytest.importorskip("lm_eval", reason="needs kvcompile[lm_eval]", exc_type=ImportError)
TASKS = Path(__file__).parent / "lm_eval_tasks"
STACK = ["budget=0.25", "kernels=sdpa"]


@pytest.fixture(autouse=True)
def foreign_warnings() -> Iterator[None]:
    """What lm_eval and its own dependencies warn of is not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the tasks."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    split = pre_tokenizers.Whitespace()
    said = " ".join(path.read_text() for path in sorted(TASKS.iterdir()))
    words = sorted({word for word, _ in split.pre_tokenize_str(said)})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> Any:
    return kvcompile.compile(tiny_model(vocab_size=len(tokenizer)), recipe="snapkv", overrides=STACK)


def evaluated(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    """lm_eval's samples of both tasks, with a model in memory."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from kvcompile.lm_eval import CompiledLM

    monkeypatch.chdir(TASKS)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    tasks = TaskManager(include_path=str(TASKS), include_defaults=False)
    names: list[Any] = ["lookup", "places"]
    lm = CompiledLM(model, tokenizer, **options)
    found = lm_eval.simple_evaluate(model=lm, tasks=names, task_manager=tasks, bootstrap_iters=0, limit=2)
    assert found is not None
    return {name: found["samples"][name] for name in names}


def test_choices_are_decode_steps_over_the_compressed_cache(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers of `cached_log_likelihood`, whatever the batch; a generation is `model.generate`'s."""
    samples = evaluated(model, tokenizer, monkeypatch, batch_size=2)
    differences = []
    for sample in samples["places"]:
        assert len(sample["arguments"]) == len(sample["resps"]) == 4
        for (context, choice), ((nats, _),) in zip(sample["arguments"], sample["resps"], strict=True):
            ids = [torch.tensor(tokenizer.encode(text)) for text in (context, choice)]
            assert float(nats) == pytest.approx(cached_log_likelihood(model, *ids)[0], abs=1e-4)
            logits = model(torch.cat(ids)[None]).logits[0, len(ids[0]) - 1 : -1]
            differences.append(abs(float(nats) + torch.nn.functional.cross_entropy(logits, ids[1], reduction="sum")))
    assert max(differences) > 1e-2, "one pass, which is what lm_eval's own class takes, is the uncompressed model's"
    for sample in samples["lookup"]:
        ids = torch.tensor(tokenizer.encode(sample["arguments"][0][0]))[None]
        said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        wanted = tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
        assert sample["resps"][0][0] == wanted.partition(".")[0]


def test_rolling_texts_are_read_over_the_cache_after_their_beginning(
    model: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from types import SimpleNamespace

    from kvcompile.lm_eval import CompiledLM

    lm = CompiledLM(model, tokenizer, rolling_context=40)
    text = " ".join(["The day was long and the road was dry."] * 11)  # 10 tokens each
    ids = torch.tensor(tokenizer.encode(text))
    start = torch.cat([torch.tensor([lm.prefix_token_id]), ids[:40]])
    with torch.no_grad():
        first = -torch.nn.functional.cross_entropy(model(start[None]).logits[0, :-1], ids[:40], reduction="sum")
    later = [
        cached_log_likelihood(model, ids[:40], ids[40:80])[0],
        cached_log_likelihood(model, ids[40:80], ids[80:])[0],
    ]
    with caplog.at_level(logging.INFO):
        (nats, none) = lm.loglikelihood_rolling([SimpleNamespace(args=(text,)), SimpleNamespace(args=("",))])
        assert "rolling: 70 of 110 tokens are read over the compressed cache of 40 tokens" in caplog.text
        lm.loglikelihood_rolling([SimpleNamespace(args=("The day was long.",))])
    assert "nothing compressed is read" in caplog.text
    assert nats == pytest.approx(float(first) + sum(later), abs=1e-3)
    assert none == 0


def test_a_context_too_long_is_cut_from_the_left(model: Any, tokenizer: Any) -> None:
    from kvcompile.lm_eval import CompiledLM

    ids = [4 + i % 50 for i in range(60)]
    (got,) = CompiledLM(model, tokenizer, max_length=40)._loglikelihood_tokens([(None, ids[:57], ids[57:])])
    assert got[0] == pytest.approx(cached_log_likelihood(model, torch.tensor(ids[19:57]), torch.tensor(ids[57:]))[0])


@pytest.mark.parametrize("options", [{}, {"model": "model"}, {"path": "x", "model": "model", "tokenizer": "t"}])
def test_it_takes_a_path_or_a_model_with_its_tokenizer(options: dict[str, Any]) -> None:
    from kvcompile.lm_eval import CompiledLM

    with pytest.raises(KvcompileError, match="takes a path, or a model and its tokenizer, got"):
        CompiledLM(**options)
    with pytest.raises(KvcompileError, match="nonesuch"):
        CompiledLM(path="nonesuch", device="cuda:0")  # which lm_eval says of itself, also where there is none


def test_without_lm_eval_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in ("kvcompile.lm_eval", "kvcompile.lm_eval.model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(KvcompileError, match=r"pip install 'kvcompile\[lm_eval\]'"):
        importlib.import_module("kvcompile.lm_eval")


def test_the_command_opens_an_artifact(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`kvcompile lm_eval` is lm_eval's own command line, and knows the model class."""
    kvcompile.save(model, tmp_path / "artifact", tokenizer)
    monkeypatch.chdir(TASKS)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    words = f"lm_eval --model kvcompile --model_args path={tmp_path / 'artifact'} --limit 2 --tasks lookup,places"
    cli._command([*words.split(), "--include_path", ".", "--output_path", str(tmp_path / "out.json")])
    (written,) = tmp_path.glob("out*.json")
    results = json.loads(written.read_text("utf-8"))["results"]
    assert {"exact_match,strip", "acc,none"} <= {key for result in results.values() for key in result}
