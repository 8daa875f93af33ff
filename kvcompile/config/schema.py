"""The one configuration: what a recipe, the command line and the Python API all end in, and its YAML form."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from kvcompile.errors import KvcompileError
from kvcompile.options import options_of
from kvcompile.stack import build_stack

if TYPE_CHECKING:
    from kvcompile.analysis.base import Analysis
    from kvcompile.exporters.base import Exporter
    from kvcompile.plan.policy import Policy
    from kvcompile.tasks.base import Question, Task

DTYPES = ("auto", "float32", "bfloat16", "float16")
MODES = ("run", "only")
QUESTION = ("seen", "hidden", "both")
OPTIONS = ("stack", "export", "analysis", "tasks")  # what a config maps from names to fields
RECIPE_NODES = 20_000  # in a recipe of 126 layers and 128 heads, each named, there are fewer


@dataclass
class ModelConfig:
    """Which model: `pretrained` is a local folder, a GGUF file or a hub id (None: the default model, offline).

    architecture: the `model_type` that it is compiled as, where its own is not known (None: its own).
    weights: `int8` or `int4`, what linear layers are rounded to when it is compiled (None: they stay as they are).
    """

    name: str = "llama"
    pretrained: str | None = None
    revision: str | None = None
    architecture: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    weights: str | None = None


@dataclass
class NeedleConfig:
    """Needle-in-a-haystack score before and after, the question seen and hidden while the cache is made.

    samples: of each length in `tokens` and each text in `haystacks` (`reference`, `library`, paths of text files).
    depths: where the number is hidden, in [0, 1]; where they are as many as all samples of a length, each is used once.
    """

    enabled: bool = True
    tokens: list[int] = field(default_factory=lambda: [1024])
    haystacks: list[str] = field(default_factory=lambda: ["reference", "library"])
    samples: int = 2
    depths: list[float] = field(default_factory=lambda: [0.1, 0.35, 0.6, 0.85])
    seed: int = 0


@dataclass
class PerplexityConfig:
    """Perplexity before and after, read through the cache: `tokens` scored after each of `windows` contexts.

    source: a text file (None: the end of the offline text, which nothing is trained on).
    """

    enabled: bool = True
    context: int = 512
    tokens: int = 96
    windows: int = 4
    source: str | None = None


@dataclass
class GateConfig:
    """What makes a compile fail, its report kept: None asks for nothing.

    max_ppl_increase: largest relative increase of perplexity (0.1: a tenth more). min_needle: least needle score, as a
    fraction of the uncompressed model's, with the question seen; min_needle_hidden: with the question hidden.
    """

    max_ppl_increase: float | None = None
    min_needle: float | None = None
    min_needle_hidden: float | None = None


@dataclass
class SpeedConfig:
    """Tokens per second before and after: decode `tokens` after a prompt of `context`."""

    enabled: bool = True
    context: int = 1024
    tokens: int = 16


@dataclass
class HealConfig:
    """Training that repairs converted weights, before anything is selected or encoded.

    tokens: how many are trained on (0: nothing is); minutes: of wall clock, if those are over first.
    loss: `distill` (towards the original model) or `lm` (the text alone). layers: share of the budget in which each
    attention learns alone what the original's gave; hidden: weight of hidden states beside logits after that.
    weights: `full`, or `lora` of `rank`; scope: `attention` or `all` weights. length, batch, accumulate: tokens a
    sequence, sequences a step and process, steps summed up. lr: peak, end to end; layers_lr: of the layers alone.
    dataset: None (offline text), a file (json, jsonl, txt, csv, parquet), a folder or a hub name, with its `subset`,
    `split` and text `column`. checkpoint_minutes: between two; resume: go on where an interrupted training stopped.
    pad_first_block: sequences of a block transformer begin anywhere in a block, the places before them empty.
    """

    tokens: int = 0
    minutes: float | None = None
    loss: str = "distill"
    layers: float = 0.3
    hidden: float = 1.0
    temperature: float = 1.0
    weights: str = "full"
    scope: str = "attention"
    rank: int = 16
    lr: float = 3e-4
    layers_lr: float = 1e-3
    length: int = 256
    batch: int = 4
    accumulate: int = 1
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    column: str = "text"
    bf16: bool = False
    checkpoint_minutes: float = 5.0
    resume: bool = True
    seed: int = 0
    pad_first_block: bool = True


@dataclass
class PromptsConfig:
    """What an analysis reads: `count` prompts of at most `tokens` tokens.

    source: None (pieces of the offline text), a text file (pieces of it), or a .json or .jsonl file of rows with
    LongBench's `context`, `input` and `answers`, or with a `text`. template: wording of the former, with {context} and
    {input} in it (None: ours). chat: said in the tokenizer's chat template.
    """

    source: str | None = None
    count: int = 2
    tokens: int = 4096
    template: str | None = None
    chat: bool = False


@dataclass
class EvaluateConfig:
    """How tasks are asked: `shard` k/n, every n-th sample from the k-th (0/1: all).

    rows: the folder of results, shared by all jobs; what lies there is not measured again. baseline: the uncompressed
    model is asked too, once for all stacks. recipes: these are asked, in one process that reads each prompt once for
    all of them; `snapkv`, `snapkv budget=0.1`, or `[all]`: every shipped one that trains nothing.
    memory: GiB for prompts that stay read (null: a third of what is free).
    """

    shard: str = "0/1"
    rows: str = "outputs/rows"
    baseline: bool = True
    recipes: list[str] = field(default_factory=list)
    memory: float | None = None

    @property
    def part(self) -> tuple[int, int]:
        """(k, n). Raises KvcompileError for anything but k/n with 0 <= k < n."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", self.shard)
        number, count = map(int, found.groups()) if found else (0, 0)
        if number >= count:
            raise KvcompileError("evaluate.shard must be k/n with 0 <= k < n", self.shard, "evaluate.shard=0/1: all")
        return number, count


@dataclass
class SearchConfig:
    """`kvcompile search`: the best stack for `bytes`, the fewest bytes for `quality`, or, with both open, the front.

    bytes: at most such a share of the bfloat16 cache after `tokens` tokens, as `1/24` or `0.04`. quality: at least such
    a share of the uncompressed model's answers. perplexity: at most such a multiple of its (null: any).
    minutes: of this process, the proof included (0: only what is known already). stacks: measured by it at most.
    space: of stacks, a file of `conf/search`. rungs: contexts that stacks are asked about; a third climbs to the next.
    study, storage: a name, and a database URL, that several processes share (null: a journal in `output`).
    batch: stacks that are read in turns (null: one, or 6 where memory does not hold the prefills of all contexts).
    memory: GiB for prefills that stay (null: a third of what is free). seed: of the draws.
    """

    bytes: str | None = None
    quality: float | None = None
    perplexity: float | None = 1.12
    minutes: float = 60.0
    stacks: int | None = None
    tokens: int = 1024
    space: str = "default"
    rungs: list[int] = field(default_factory=lambda: [2, 6, 18])
    study: str = "search"
    storage: str | None = None
    batch: int | None = None
    memory: float | None = None
    seed: int = 0


@dataclass
class PlanConfig:
    """`only`: print the plan for a `batch` of prompts of `context` tokens, and what fits in `memory` GiB; then stop."""

    mode: str = "run"
    batch: int = 1
    context: int = 4096
    memory: float | None = None


@dataclass
class Config:
    """Everything a compile depends on. `stack` maps each policy, in order, to its fields, `export` each exporter,
    `analysis` each analysis, `tasks` each task of `evaluate=[...]`.

    budget: shortcut, sets the budget of every policy in the stack that has one; folded into `stack` when resolved.
    prefill_chunk: prompt tokens per prefill step (0: all at once). kernels: its backend. output: artifact folder.
    artifact: nothing is compiled, what lies in this folder is exported, into `output`. analysis: nothing is compiled,
    the original model is analysed on `prompts`. tasks: they are asked, as `evaluate` says, and no artifact is written.
    question: in sight while a cache is made (`seen`), after it (`hidden`), or `both`.
    """

    recipe: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    stack: dict[str, Any] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)
    analysis: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, Any] = field(default_factory=dict)
    question: str = "both"
    artifact: str | None = None
    budget: float | None = None
    prefill_chunk: int = 0
    kernels: str = "auto"
    output: str | None = None
    heal: HealConfig = field(default_factory=HealConfig)
    needle: NeedleConfig = field(default_factory=NeedleConfig)
    perplexity: PerplexityConfig = field(default_factory=PerplexityConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)

    @property
    def label(self) -> str:
        """`<recipe, or the policies joined by +>-<model>`, or `analysis-<model>`."""
        if self.analysis:
            return f"analysis-{self.model.name}"
        return f"{self.recipe or '+'.join(self.stack) or 'dense'}-{self.model.name}"

    def policies(self) -> tuple[Policy, ...]:
        """The stack as policies. Raises KvcompileError (see `build_stack`)."""
        return build_stack(list(self.stack), self.stack)

    def exporters(self) -> tuple[Exporter, ...]:
        """The exporters with their options. Raises KvcompileError (see `build_exporters`)."""
        from kvcompile.exporters.registry import build_exporters

        return build_exporters(self.export)

    def analyses(self) -> tuple[Analysis, ...]:
        """The analyses with their options. Raises KvcompileError (see `build_analyses`)."""
        from kvcompile.analysis.registry import build_analyses

        return build_analyses(self.analysis)

    def built_tasks(self) -> tuple[Task, ...]:
        """The tasks with their options. Raises KvcompileError (see `build_tasks`)."""
        from kvcompile.tasks.registry import build_tasks

        return build_tasks(self.tasks)

    @property
    def questions(self) -> tuple[Question, ...]:
        """The settings of the question that are asked for, in order."""
        return cast("tuple[Question, ...]", QUESTION[:2] if self.question == "both" else (self.question,))

    def with_policies(self, policies: Iterable[Policy]) -> Config:
        """The config with these policies, e.g. after calibration."""
        return replace(self, stack=options_of(policies))
