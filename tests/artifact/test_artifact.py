"""Artifacts: what comes back is the model that was saved, and a save happens as a whole or not at all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, tiny_ids, tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel, pipeline

import kvcompile
from kvcompile import atomic
from kvcompile.artifact import artifact, manifest
from kvcompile.errors import KvcompileError
from kvcompile.kernels.dispatch import choose

SNAPKV = ("policy=[snapkv]", "stack.snapkv.budget=0.4", "stack.snapkv.window=4", "stack.snapkv.decode_every=3")
STACKS = {
    "snapkv": SNAPKV,
    "adakv": ("policy=[adakv]", "budget=0.3"),
    "zigzag": ("policy=[zigzag]", "budget=0.5"),
    "streaming": ("policy=[streaming]", "budget=12"),
    "random": ("policy=[random]", "budget=0.5"),
    "chunked": (*SNAPKV, "prefill_chunk=16"),
    "dense": (),
}


def compiled(name: str = "llama", stack: tuple[str, ...] = SNAPKV, **over: Any) -> Any:
    return kvcompile.compile(tiny_model(name, **over), overrides=stack)


@pytest.fixture(scope="module")
def model() -> Any:
    return compiled()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Path:
    return artifact.save(model, tmp_path_factory.mktemp("made") / "artifact", tiny_tokenizer())


@torch.no_grad()
def assert_same(one: Any, other: Any) -> None:
    """Bit-equal logits in a prefill that evicts and in decoding, and equal generations, padded batch included."""
    ids = tiny_ids(2, 40)
    a, b = one(ids), other(ids)
    assert torch.equal(a.logits, b.logits)
    assert a.past_key_values.lengths() == b.past_key_values.lengths()
    for token in tiny_ids(5, 2, seed=1):
        a = one(token[:, None], past_key_values=a.past_key_values)
        b = other(token[:, None], past_key_values=b.past_key_values)
        assert torch.equal(a.logits, b.logits)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(one.generate(ids, **options), other.generate(ids, **options))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_comes_back_is_what_was_saved(name: str, tmp_path: Path) -> None:
    # with generated kernels where a family's are not those of llama, which the next test saves
    model = compiled(name, SNAPKV if name == "gemma2" else (*SNAPKV, "kernels=sdpa"))
    loaded = kvcompile.load(artifact.save(model, tmp_path / "a"))
    assert_same(model, loaded)
    assert type(loaded).__name__ == type(model).__name__
    assert loaded.kvcompile.plan == model.kvcompile.plan
    assert loaded.kvcompile.recipe == model.kvcompile.recipe
    assert not loaded.training


@pytest.mark.parametrize("stack", STACKS)
def test_every_kind_of_stack_comes_back(stack: str, tmp_path: Path) -> None:
    model = compiled(stack=STACKS[stack])
    loaded = kvcompile.from_pretrained(str(artifact.save(model, tmp_path / "a")))
    assert_same(model, loaded)
    cache = loaded(tiny_ids(1, 60)).past_key_values
    assert (cache.evictions.events > 0) == (stack != "dense")


def test_a_loaded_model_saves_the_same_artifact(made: Path, tmp_path: Path) -> None:
    again = artifact.save(kvcompile.load(made), tmp_path / "again", tiny_tokenizer())
    assert manifest.read(again).files == manifest.read(made).files


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path: Path) -> None:
    model = compiled(tie_word_embeddings=True)
    path = artifact.save(model, tmp_path / "tied")
    loaded = kvcompile.load(path)
    assert_same(model, loaded)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    saved = manifest.read(path).files["model.kvcompile.safetensors"].bytes
    assert saved < 4 * sum(p.numel() for p in loaded.parameters()) + 10_000


def test_dtype_is_as_saved_unless_asked_for(tmp_path: Path) -> None:
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "checkpoint")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.bfloat16)
    model = kvcompile.compile(half, overrides=SNAPKV)
    path = artifact.save(model, tmp_path / "a")
    loaded = kvcompile.load(path)
    assert loaded.dtype == torch.bfloat16
    assert_same(model, loaded)
    for asked in ("float32", torch.float32):
        whole = kvcompile.load(path, device="cpu", dtype=asked)
        assert (whole.dtype, whole.kvcompile.plan.dtype) == (torch.float32, "float32")
    with pytest.raises(KvcompileError, match=r"dtype must be one of float32, .* got int8"):
        kvcompile.load(path, dtype="int8")
    with pytest.raises(KvcompileError, match=r"device must be .* got nonsense"):
        kvcompile.load(path, device="nonsense")


def test_the_folder_holds_what_it_promises(made: Path, model: Any) -> None:
    files = set(manifest.read(made).files)
    there = {p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file()}
    assert files == there - {"manifest.json", "README.md"}
    assert {"config.json", "generation_config.json", "model.kvcompile.safetensors", "recipe.yaml", "plan.json"} <= files
    assert json.loads((made / "plan.json").read_text()) == json.loads(json.dumps(model.kvcompile.plan.to_json()))
    assert "kv_append" in (made / "graph.txt").read_text()
    assert "layer   3 reads the KV of layer   3" in (made / "graph.txt").read_text()
    assert f"| 3       | {choose('auto').name:9} | dense-float32-g2-d16" in (made / "kernels/layers.md").read_text()
    assert AutoTokenizer.from_pretrained(made)("w7 w9")["input_ids"] == [7, 9]
    config = json.loads((made / "config.json").read_text())
    original = config["kvcompile"]["original"]
    assert (original["architectures"], original["model_type"], config["dtype"]) == (
        ["LlamaForCausalLM"],
        "llama",
        "float32",
    )
    assert config["kvcompile"]["policies"] == ["snapkv"]
    assert config["kvcompile"]["plan"] == manifest.read(made).plan == model.kvcompile.plan.digest()
    assert {*manifest.read(made).versions} == {"kvcompile", "torch", "transformers"}


def test_files_of_the_compiler_are_in_the_manifest(model: Any, tmp_path: Path) -> None:
    def report(folder: Path) -> None:
        (folder / "plots").mkdir()
        (folder / "plots" / "bars.png").write_bytes(b"png")

    path = artifact.save(model, tmp_path / "a", extra=report)
    assert manifest.read(path).files["plots/bars.png"].bytes == 3
    assert kvcompile.load(path)


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = compiled()
    config, before = model.config, dict(vars(model.config))
    artifact.save(model, tmp_path / "a")
    assert model.config is config
    assert {k: v for k, v in vars(config).items() if k != "kvcompile"} == {
        k: v for k, v in before.items() if k != "kvcompile"
    }
    assert config.kvcompile == manifest.stamp(model.kvcompile.plan, config)


OPENERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "config": (AutoConfig.from_pretrained, "open with kvcompile.load"),
    "model": (AutoModelForCausalLM.from_pretrained, "open with kvcompile.load"),
    "pipeline": (lambda folder: pipeline("text-generation", model=str(folder)), "open with kvcompile.load"),
    "its own class": (LlamaForCausalLM.from_pretrained, "no file named model.safetensors"),
}


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("stack", ["snapkv", "cla"])
def test_transformers_alone_opens_no_artifact(opener: str, stack: str, tmp_path: Path) -> None:
    """It would run another model in silence: the uncompressed one, or one with random layers."""
    made = artifact.save(compiled(stack=(f"policy=[{stack}]", "kernels=sdpa")), tmp_path / "a", tiny_tokenizer())
    opened, words = OPENERS[opener]
    with pytest.raises((ValueError, OSError), match=words):
        opened(made)


def test_a_tokenizer_is_read_by_transformers_without_a_warning(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert AutoTokenizer.from_pretrained(made)("w7 w9")["input_ids"] == [7, 9]
    assert not caplog.records


def test_what_an_artifact_says_of_its_model_is_not_taken_for_a_checkpoint(made: Path) -> None:
    from kvcompile.config.schema import ModelConfig
    from kvcompile.models.loading import config_of

    with pytest.raises(KvcompileError, match=r"an artifact\. Fix: kvcompile\.load opens it"):
        config_of(ModelConfig(pretrained=str(made)))


# saving: all or nothing


def _contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _interrupt(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


WRITERS = {
    "weights": lambda patch, model: patch.setattr(PreTrainedModel, "save_pretrained", _interrupt),
    "safetensors": lambda patch, model: patch.setattr("transformers.modeling_utils.safe_save_file", _interrupt),
    "graph": lambda patch, model: patch.setattr(artifact, "_graph_text", _interrupt),
    "manifest": lambda patch, model: patch.setattr(manifest, "write", _interrupt),
    "sync": lambda patch, model: patch.setattr(artifact, "_sync", _interrupt),
    "publish": lambda patch, model: patch.setattr(atomic, "publish", _interrupt),
}


@pytest.mark.parametrize("old", [False, True], ids=["nothing before", "an artifact before"])
@pytest.mark.parametrize("where", WRITERS)
def test_an_interrupt_leaves_what_was_there(
    where: str, old: bool, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a"
    if old:
        artifact.save(compiled(stack=()), target)
    before = _contents(tmp_path)
    config = model.config
    with monkeypatch.context() as patch:
        WRITERS[where](patch, model)
        with pytest.raises(KeyboardInterrupt):
            artifact.save(model, target, tiny_tokenizer())
    assert _contents(tmp_path) == before
    assert {p.name for p in tmp_path.iterdir()} == ({"a"} if old else set())
    assert model.config is config
    assert_same(model, kvcompile.load(artifact.save(model, target)))


def test_an_interrupt_between_the_two_renames_puts_the_old_one_back(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact.save(compiled(stack=()), tmp_path / "a")
    before = _contents(tmp_path)
    rename, done = Path.rename, []

    def second_fails(path: Path, target: Path) -> Path:
        if len(done) == 1 and path.name == "artifact":
            _interrupt()
        renamed = rename(path, target)
        done.append(path.name)
        return renamed

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_exchanged", lambda one, other: False)
        patch.setattr(Path, "rename", second_fails)
        with pytest.raises(KeyboardInterrupt):
            artifact.save(model, tmp_path / "a")
    assert done == ["a", ".replaced"]
    assert _contents(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_a_killed_save_left_is_swept_by_the_next(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder holds all weights; it has to be another process that left it, for ours still hold their locks."""
    code = """
import os, signal, sys
from pathlib import Path
from kvcompile import atomic
with atomic.making(Path(sys.argv[1]), ".saving-") as scratch:
    (scratch / "weights").write_text("many")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=False)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".saving-")
    monkeypatch.setattr(atomic, "YOUNG_SECONDS", 0.0)
    artifact.save(model, tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_report_that_fails_leaves_nothing(error: type[BaseException], model: Any, tmp_path: Path) -> None:
    def report(folder: Path) -> None:
        (folder / "report.md").write_text("half")
        raise error

    with pytest.raises(error):
        artifact.save(model, tmp_path / "a", extra=report)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(KvcompileError, match=r"could not be written to .*No space left"):
        artifact.save(model, tmp_path / "a", extra=full)
    assert not list(tmp_path.iterdir())


def test_the_second_save_replaces_the_first_as_a_whole(model: Any, tmp_path: Path) -> None:
    target = tmp_path / "a"
    artifact.save(model, target, extra=lambda tmp: (tmp / "old.md").write_text("old"))
    (target / "manifest.json").write_text("broken")
    other = compiled(stack=STACKS["streaming"])
    artifact.save(other, target)
    assert not (target / "old.md").exists()
    assert_same(other, kvcompile.load(target))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_link_to_a_folder_is_followed(model: Any, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    artifact.save(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "manifest.json").is_file()


def test_files_of_others_are_never_replaced(model: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(KvcompileError, match=r"only an artifact is replaced.*Fix: save elsewhere"):
        artifact.save(model, tmp_path)
    with pytest.raises(KvcompileError, match=r"thesis\.tex: a file"):
        artifact.save(model, tmp_path / "thesis.tex")
    assert _contents(tmp_path) == {"thesis.tex": b"years of work"}


def test_what_would_not_come_back_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(KvcompileError, match="compiled from a recipe, got LlamaForCausalLM"):
        artifact.save(tiny_model(), tmp_path / "a")
    mixed = compiled()
    mixed.lm_head.to(torch.bfloat16)
    with pytest.raises(KvcompileError, match=r"one dtype .* got bfloat16, float32"):
        artifact.save(mixed, tmp_path / "a")
    with pytest.raises(KvcompileError, match="inv_freq must be float32"):
        artifact.save(kvcompile.compile(tiny_model().to(torch.bfloat16), overrides=SNAPKV), tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["gemma3_text", "mixtral", "smollm3"])
def test_bfloat16_checkpoints_come_back(name: str, tmp_path: Path) -> None:
    tiny_model(name).to(torch.bfloat16).save_pretrained(tmp_path / "checkpoint")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.bfloat16)
    model = kvcompile.compile(half, overrides=SNAPKV)
    assert_same(model, kvcompile.load(artifact.save(model, tmp_path / "a")))


# weights that are not plain


class Codes(torch.Tensor):
    """Stands for a quantised weight."""


def _quantised(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().as_subclass(Codes))


def _packed(model: Any) -> None:
    model.lm_head.register_buffer("codes", torch.zeros(4, dtype=torch.int8))


def _adapted(model: Any) -> None:
    model.lm_head.extra = torch.nn.Linear(2, 2)


def _poisoned(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("inf")


UNSAVEABLE: dict[str, tuple[Callable[[Any], None], str]] = {
    "quantised": (_quantised, r"plain floating-point weights, got lm_head\.weight: Codes of float32"),
    "packed": (_packed, r"plain floating-point weights, got lm_head\.codes: Tensor of int8"),
    "adapted": (_adapted, r"those of a LlamaForCausalLM, got lm_head\.extra\.weight: \[2, 2\] where nothing belongs"),
    "not finite": (_poisoned, r"finite, got lm_head\.weight"),
}


@pytest.mark.parametrize("kind", UNSAVEABLE)
def test_weights_that_would_not_load_are_refused_before_they_are_written(kind: str, tmp_path: Path) -> None:
    change, words = UNSAVEABLE[kind]
    model = compiled(stack=("policy=[snapkv]", "kernels=sdpa"))
    change(model)
    with pytest.raises(KvcompileError, match=words):
        kvcompile.save(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_job_refuses_quantised_weights_before_it_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kvcompile import compiler
    from kvcompile.config.compose import compose
    from kvcompile.job import compile_and_report
    from kvcompile.progress import silent

    model = tiny_model()
    _quantised(model)
    monkeypatch.setattr(compiler, "assemble", None)  # calling it is another error
    with pytest.raises(KvcompileError, match="plain floating-point weights"):
        compile_and_report(model, tiny_tokenizer(), compose(["policy=[snapkv]", f"output={tmp_path}/a"]), silent)


# where weights lie, and how transformers' users ask for them


def test_weights_lie_where_torch_would_lay_them(tmp_path: Path) -> None:
    """Elsewhere (in a mapped file) libraries sum in another order, and logits differ in their last bits."""
    model = tiny_model()
    for parameter in model.parameters():
        room = torch.empty(parameter.numel() + 1)
        parameter.data = room[1:].view_as(parameter).copy_(parameter.detach())
    model = kvcompile.compile(model, overrides=[*SNAPKV, "kernels=sdpa"])
    loaded = kvcompile.load(artifact.save(model, tmp_path / "a"))
    for one in (model, loaded):
        assert not [name for name, p in one.named_parameters() if p.data_ptr() % 64]
    assert_same(model, loaded)


def test_save_pretrained_writes_a_whole_artifact(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "a", tokenizer=tiny_tokenizer())
    loaded = kvcompile.from_pretrained(tmp_path / "a", torch_dtype="auto", device_map="auto")
    assert_same(model, loaded)
    loaded.save_pretrained(tmp_path / "b", is_main_process=False)
    assert not (tmp_path / "b").exists()
    with pytest.raises(KvcompileError, match=r"saved with save_directory and tokenizer, got variant"):
        model.save_pretrained(tmp_path / "b", variant="fp16")


def test_a_tokenizer_saved_beside_an_artifact_is_told_how_to_come_along(model: Any, tmp_path: Path) -> None:
    """The two calls of transformers' users: the manifest was made before the second one."""
    folder = tmp_path / "a"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(KvcompileError, match=r"got tokenizer\.json, tokenizer_config\.json\. Fix: move them") as error:
        kvcompile.load(folder)
    _, _, command = str(error.value).partition("in one call: ")
    exec(command.removesuffix("."), {"kvcompile": kvcompile, "model": model, "tokenizer": tiny_tokenizer()})
    assert_same(model, kvcompile.load(folder))
    assert AutoTokenizer.from_pretrained(folder)("w7")["input_ids"] == [7]


@pytest.mark.parametrize("most", [100, 20_000], ids=["config", "weights"])
def test_a_full_disk_asks_for_room(most: int, made: Path, tmp_path: Path) -> None:
    """Not for another config: what safetensors raises then is no OSError."""
    code = f"""
import resource, kvcompile
model = kvcompile.load({str(made)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, ({most}, resource.RLIM_INFINITY))
try:
    kvcompile.save(model, {str(tmp_path / "full")!r})
except kvcompile.KvcompileError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.endswith("got File too large. Fix: make room, or save elsewhere.\n"), said


def test_keywords_of_transformers(made: Path) -> None:
    assert kvcompile.from_pretrained(made, dtype=torch.bfloat16, device_map="cpu").dtype == torch.bfloat16
    assert kvcompile.load(made, torch_dtype="float16", device_map={"": "cpu"}).dtype == torch.float16
    with pytest.raises(KvcompileError, match=r"one device, .* Fix: give device=<one>"):
        kvcompile.load(made, device_map={"model.embed_tokens": "cpu", "lm_head": "disk"})
    with pytest.raises(KvcompileError, match="got attn_implementation"):
        kvcompile.from_pretrained(made, attn_implementation="sdpa")


def test_an_artifact_on_the_hub(model: Any, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[tuple[str, str, str | None]] = []

    def download(repo: str, name: str = "all", revision: str | None = None) -> str:
        asked.append((repo, name, revision))
        return str(made)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_same(model, kvcompile.load("someone/small-cache", revision="v1"))
    assert asked == [("someone/small-cache", "manifest.json", "v1"), ("someone/small-cache", "all", "v1")]

    def nothing(*args: Any, **kwargs: Any) -> str:
        raise OSError("404 Client Error.\n\nEntry Not Found")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", nothing)
    with pytest.raises(KvcompileError, match=r"someone/large must be the folder of an artifact, or its id on the hub"):
        kvcompile.load("someone/large")


def test_push_to_hub_uploads_a_whole_artifact(
    model: Any, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    class Hub:
        def __init__(self, token: str | None) -> None:
            self.token = token

        def create_repo(self, repo: str, private: bool | None, exist_ok: bool) -> Any:
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo}")

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> str:
            shutil.copytree(folder_path, tmp_path / "there")
            return f"{repo_id}: {commit_message}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    done = model.push_to_hub("someone/small-cache", tiny_tokenizer(), private=True, commit_message="first")
    assert done == "someone/small-cache: first"
    assert manifest.read(tmp_path / "there").files == manifest.read(made).files
    assert_same(model, kvcompile.load(tmp_path / "there"))
