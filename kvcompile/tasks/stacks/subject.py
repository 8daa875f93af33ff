"""What is asked: a stack on a model, known by name and hash before a weight is read, and at work when it is wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompile.analysis.parts import digest, fingerprint
from kvcompile.config.recipe import from_recipe
from kvcompile.config.schema import Config, HealConfig, ModelConfig
from kvcompile.errors import KvcompileError, wrapped_errors
from kvcompile.evaluation.heldout import longest, longest_of
from kvcompile.progress import Progress, no_foreign_bars, silent
from kvcompile.tasks.stacks.naming import DENSE, differing, name_of, stack_words

if TYPE_CHECKING:
    from kvcompile.artifact.manifest import Manifest
    from kvcompile.tasks.ask import Respondent
    from kvcompile.tasks.base import Sample

WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class Stack:
    """A stack on a model.

    Attributes:
        name: how it is called, `dense` for the model as it is. policies: names and options, in order.
        settings: what else its answers depend on. words: the command line that makes it.
        model: its name. source: hash of the files that it comes from. dtype: in which it runs.
        open: gives it at work, and the hash of some numbers of its weights. It loads, converts and compiles.
    """

    name: str
    policies: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any]
    words: tuple[str, ...]
    model: str
    source: str
    dtype: str
    open: Callable[[], tuple[Respondent, str]]

    @property
    def identity(self) -> dict[str, Any]:
        """All that its answers depend on, as plain data."""
        stack = [[name, options] for name, options in self.policies.items()]
        return {"source": self.source, "dtype": self.dtype, "stack": stack, **self.settings}


@dataclass(frozen=True)
class Subject:
    """Stacks over one tokenizer. longest: positions that the model knows. notes: what a reader must know.

    expect: is told the samples that will be asked.
    """

    tokenizer: Any
    longest: int
    stacks: tuple[Stack, ...]
    notes: tuple[str, ...] = ()
    expect: Callable[[Sequence[Sample]], None] = lambda samples: None


class Checkpoint:
    """A model as `model=` names it; tokenizer and weights are read when they are first wanted.

    Raises KvcompileError where its configuration cannot be read.
    """

    def __init__(self, model: ModelConfig, progress: Progress = silent) -> None:
        from kvcompile.compiler import cache_dtype
        from kvcompile.models.loading import config_of
        from kvcompile.models.provenance import DEFAULT, base_of

        self.given, self.progress = model, progress
        self.architecture = config_of(model)
        self.dtype = cache_dtype(model, getattr(self.architecture, "dtype", None))
        file = Path(str(model.pretrained))
        self.name = file.stem if file.suffix == ".gguf" else base_of(self.architecture).name
        if model.pretrained is None:
            self.name = DEFAULT.rpartition("/")[2]

    @cached_property
    def source(self) -> str:
        """A hash of its files."""
        from kvcompile.models.loading import fingerprint_of_files

        return fingerprint_of_files(self.given, self.architecture, self.progress)

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer, without the weights."""
        from kvcompile.models.loading import tokenizer_of

        return tokenizer_of(self.given, self.progress)

    @cached_property
    def loaded(self) -> Any:
        """The model, as it is: what is compiled shares its weights."""
        from kvcompile.models.loading import load

        return load(self.given, self.progress, self.architecture)[0]

    @cached_property
    def weights(self) -> str:
        """The hash of some of its numbers."""
        return fingerprint(self.loaded)

    def stack(self, config: Config) -> Stack:
        """The stack of a config on this model. Raises KvcompileError where it cannot be, before weights are read."""
        from kvcompile.compiler import assemble, plan_config
        from kvcompile.models.sharing import shared

        config = replace(config, tasks={}, model=self.given)
        plan = plan_config(config, self.architecture)

        def open() -> tuple[Respondent, str]:
            weights = self.weights  # before a conversion
            model = assemble(shared(self.loaded), config, self.tokenizer, self.progress, stack=plan)
            return _respondent(model, self.tokenizer), weights

        kernels = [] if config.kernels == "auto" else [f"kernels={config.kernels}"]
        model = [f"model={self.given.name}", *differing("model", self.given, ModelConfig())]
        words = (*stack_words(config), *model, *kernels)
        settings: dict[str, Any] = {"prefill_chunk": config.prefill_chunk, "kernels": config.kernels}
        if self.given.weights:
            settings["weights"] = self.given.weights
        if config.heal.tokens:
            settings["heal"] = vars(config.heal)
        facts = (self.name, self.source, self.dtype)
        return Stack(name_of(config), config.stack, settings, words, *facts, open)


def of_config(config: Config, progress: Progress = silent) -> Subject:
    """What a job of the command line asks: an artifact, or a stack on a model; with the uncompressed model before it.

    Raises KvcompileError for what cannot be read or planned.
    """
    if config.artifact:
        return _of_artifact(config, progress)
    checkpoint = Checkpoint(config.model, progress)
    stacks = [checkpoint.stack(config)]
    if config.evaluate.baseline and stacks[0].name != DENSE:
        stacks.insert(0, checkpoint.stack(_dense(config)))
    return Subject(checkpoint.tokenizer, longest_of(checkpoint.architecture), tuple(stacks))


def _dense(config: Config) -> Config:
    """The config of the uncompressed model."""
    return replace(config, recipe=None, stack={}, prefill_chunk=0, heal=HealConfig(), artifact=None)


def _of_artifact(config: Config, progress: Progress) -> Subject:
    """An artifact, beside the model that its recipe names, where that is the one that was compiled."""
    from kvcompile.artifact import weights
    from kvcompile.artifact.artifact import load
    from kvcompile.models.provenance import base_of

    folder = Path(str(config.artifact)).expanduser()
    facts, recipe = _facts(folder)
    tokenizer, stored = _tokenizer(folder), weights.Stored(folder, facts)
    architecture = weights.original_config(folder, stored)
    base = base_of(architecture).name
    asked = None if config.model.dtype == "auto" else config.model.dtype
    place = {"device_map": "auto"} if config.model.device == "auto" else {"device": config.model.device}

    def open() -> tuple[Respondent, str]:
        with no_foreign_bars():
            model = load(folder, dtype=asked, **place)
        return _respondent(model, tokenizer), fingerprint(model)

    source = digest([facts.plan, {name: fact.sha256 for name, fact in facts.files.items() if name.endswith(WEIGHTS)}])
    dtype = asked or stored.dtype
    words = (f"artifact={folder.name}",)
    settings = {"prefill_chunk": recipe.prefill_chunk, "kernels": recipe.kernels}
    stack = Stack(name_of(recipe), recipe.stack, settings, words, base, source, dtype, open)
    stacks: list[Stack] = [stack]
    notes: tuple[str, ...] = ()
    if config.evaluate.baseline and stack.name != DENSE:
        dense, notes = _original(recipe, base, progress)
        stacks[:0] = dense
    return Subject(tokenizer, longest_of(architecture), tuple(stacks), notes)


def _original(recipe: Config, base: str, progress: Progress) -> tuple[list[Stack], tuple[str, ...]]:
    """The uncompressed model of an artifact; none, and why, where its recipe does not lead to it."""
    try:
        checkpoint = Checkpoint(recipe.model, progress)
        if checkpoint.name == base:
            return [checkpoint.stack(_dense(recipe))], ()
        reason = f"it names {checkpoint.name}"
    except KvcompileError as error:
        reason = str(error)
    return [], (f"No dense row: the artifact was made from {base}, which its recipe does not lead to ({reason}).",)


def _facts(folder: Path) -> tuple[Manifest, Config]:
    """The manifest and the recipe of an artifact, its files unchecked: opening it does that."""
    from kvcompile.artifact import manifest

    facts = manifest.read(folder)
    with wrapped_errors(f"{folder} must be an artifact", manifest.REMADE):
        return facts, from_recipe(manifest.read_text(folder / manifest.RECIPE))


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    from kvcompile.models.default import DATA_ONLY

    if not (folder / "tokenizer_config.json").is_file():
        raise KvcompileError(
            "an evaluation needs a tokenizer", f"{folder}: none was saved", "kvcompile.save(model, folder, tokenizer)"
        )
    return AutoTokenizer.from_pretrained(folder, **DATA_ONLY)


def of_model(model: Any, tokenizer: Any) -> Subject:
    """A model in memory: a compiled one, or one of transformers, which is left as it is.

    Raises KvcompileError for what is no causal LM that is known.
    """
    from kvcompile.adapters.architectures import describe
    from kvcompile.compiler import compile_plan
    from kvcompile.models.provenance import base_of
    from kvcompile.models.sharing import shared

    dtype = str(model.dtype).removeprefix("torch.")
    weights = fingerprint(model)
    compiled = getattr(model, "kvcompile", None)

    def open() -> tuple[Respondent, str]:
        if compiled is not None:
            return _respondent(model, tokenizer), weights
        return _respondent(compile_plan(shared(model), describe(model.config, dtype)), tokenizer), weights

    name, policies, settings = DENSE, {}, {}
    if compiled is not None:
        settings = {"plan": compiled.plan.digest(), "kernels": compiled.kernels}
        if compiled.recipe:
            config = from_recipe(compiled.recipe)
            name, policies = name_of(config), config.stack
        else:
            policies = {applied.name: {} for applied in compiled.plan.applied}
            name = "+".join(policies) or DENSE
    stack = Stack(name, policies, settings, (), base_of(model.config).name, weights, dtype, open)
    return Subject(tokenizer, longest(model), (stack,))


def _respondent(model: Any, tokenizer: Any) -> Respondent:
    from kvcompile.analysis.compare.contest import Runner
    from kvcompile.tasks.ask import respondent

    return respondent(Runner(model.kvcompile.plan, model, None), tokenizer)
