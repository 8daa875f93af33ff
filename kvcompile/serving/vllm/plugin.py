"""The entry point of `vllm.general_plugins`: runs in every process of vLLM, before any config is made.

A model without a plan is served as if this package was not there.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

from kvcompile.errors import KvcompileError
from kvcompile.serving.vllm.rules import PromptRule, last_chunk, remembers
from kvcompile.serving.vllm.served import FILE, MODEL_TYPE, TESTED, Served, read

CACHES = ("auto", "float32", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2")
log = logging.getLogger(__name__)
PLAN = "kvcompile_served"  # attribute of the config of a served model


def register() -> None:
    """Make folders of export=[vllm] known to vLLM; where this vLLM was not tested, known as what it cannot serve."""
    from transformers import AutoConfig, PreTrainedConfig
    from vllm import __version__ as version

    class Known(PreTrainedConfig):  # type: ignore[misc]
        """The config of a served folder: what the model's own class says, with the plan's digest."""

        model_type = MODEL_TYPE

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            """The config of the model's own class."""
            _require_tested(version)
            return original(config_dict, **kwargs)

    AutoConfig.register(MODEL_TYPE, Known, exist_ok=True)
    if version.startswith(f"{TESTED}."):
        _install()


def original(config_dict: dict[str, Any], **kwargs: Any) -> Any:
    """The transformers config of a served model, in its own class; vLLM then runs the model's own code."""
    from transformers import CONFIG_MAPPING

    facts = config_dict.get("kvcompile")
    if not isinstance(facts, dict) or not {"original", "served"} <= set(facts):
        raise KvcompileError("config.json of a served model says what it was", "no digest in it", "export=[vllm] again")
    own = {**config_dict, **facts["original"]}
    # the one switch by which vLLM gives a backend the lengths of prompts; no attention on CPUs reads it
    return CONFIG_MAPPING[own["model_type"]].from_dict({**own, "rswa_window": 1}, **kwargs)


def _require_tested(version: str) -> None:
    if not version.startswith(f"{TESTED}."):
        raise KvcompileError(
            f"kvcompile serves with vLLM {TESTED}, whose inner names it touches",
            version,
            f"pip install vllm=={TESTED}.*",
        )
    from kvcompile.serving.vllm.private import moved

    if moved():
        raise KvcompileError("this vLLM must have the names that kvcompile touches", ", ".join(moved()))


def _install() -> None:
    """Backend, spec with its manager, and three wraps that do nothing for a model without a plan; once a process."""
    from kvcompile.serving.vllm import private
    from kvcompile.serving.vllm.spec import KeptManager, KeptSpec

    if hasattr(private.Attention.get_kv_cache_spec, "__wrapped__"):
        return
    path = "kvcompile.serving.vllm.cpu.KeptBackend"
    private.register_backend(private.AttentionBackendEnum.CPU_ATTN, path)
    private.KVCacheSpecRegistry._ensure_registered()  # else ours would be the only spec there is
    private.KVCacheSpecRegistry.register(KeptSpec, KeptManager, uniform_type_base_spec=private.FullAttentionSpec)
    private.Attention.get_kv_cache_spec = _with_rule(private.Attention.get_kv_cache_spec)
    config = private.VllmConfig
    config.try_verify_and_update_config = _with_plan(config.try_verify_and_update_config)
    private.InputProcessor.process_inputs = _in_one_piece(private.InputProcessor.process_inputs)


def _with_rule(stock: Any) -> Any:
    """`Attention.get_kv_cache_spec` with the rule of the layer in the spec."""

    @functools.wraps(stock)
    def get_kv_cache_spec(self: Any, vllm_config: Any) -> Any:
        from kvcompile.serving.vllm import private
        from kvcompile.serving.vllm.spec import KeptSpec

        spec = stock(self, vllm_config)
        served = _plan_of(vllm_config.model_config.hf_config)
        rule = None if served is None else served.rules[private.extract_layer_index(self.layer_name)]
        if rule is None:
            return spec
        if type(spec) is not private.FullAttentionSpec:
            raise KvcompileError("kvcompile drops tokens of full attention", type(spec).__name__)
        return private.replace_as(spec, KeptSpec, rule=rule, granularity=spec.block_size)

    return get_kv_cache_spec


def _plan_of(config: Any) -> Served | None:
    """The plan of a model; None: it has none. Raises KvcompileError where it has one that was not read."""
    served: Served | None = getattr(config, PLAN, None)
    if served is None and _digest(config) is not None:
        raise KvcompileError("the plan of a served model is read before its layers are made", "no plan")
    return served


def _digest(config: Any) -> str | None:
    facts = getattr(config, "kvcompile", None)
    return facts.get("served") if isinstance(facts, dict) else None


def _with_plan(stock: Any) -> Any:
    """`VllmConfig.try_verify_and_update_config` that reads the plan of a served model and sets what it needs."""

    @functools.wraps(stock)
    def try_verify_and_update_config(self: Any) -> None:
        stock(self)
        model = self.model_config
        digest = None if model is None else _digest(model.hf_config)
        if digest is not None and not hasattr(model.hf_config, PLAN):
            setattr(model.hf_config, PLAN, _prepared(self, digest))

    return try_verify_and_update_config


def _in_one_piece(stock: Any) -> Any:
    """`InputProcessor.process_inputs` that refuses a prompt which grows after it was read.

    Its length would be another one, and with it what every process takes for free.
    """

    @functools.wraps(stock)
    def process_inputs(self: Any, *args: Any, resumable: bool = False, **kwargs: Any) -> Any:
        if resumable and _digest(self.model_config.hf_config) is not None:
            raise KvcompileError(
                "a prompt is compacted once, at its end", "a prompt that comes in pieces", "send it whole"
            )
        return stock(self, *args, resumable=resumable, **kwargs)

    return process_inputs


def _prepared(config: Any, digest: str) -> Served:
    """The plan of the model of a vLLM config, which is set to serve it. Raises KvcompileError where it cannot be."""
    from kvcompile.serving.vllm import private
    from kvcompile.serving.vllm.turning import require_known_turns

    model = config.model_config
    facts = private.get_hf_file_to_dict(FILE, model.model, model.revision)
    if facts is None:
        raise KvcompileError(f"a served model has its {FILE}", model.model, "export=[vllm] again")
    served = read(facts, digest)
    layers = model.hf_config.num_hidden_layers
    if len(served.rules) != layers:
        raise KvcompileError(f"{FILE} must be the plan of this model", f"{len(served.rules)} layers, not {layers}")
    _require_supported(config)
    require_known_turns(served.plan, model.hf_config)
    _require_heads(served, config.parallel_config.tensor_parallel_size)
    _set_caching(config.cache_config, served.rules)
    scheduler = config.scheduler_config
    _require_room(scheduler, last_chunk(served.rules))
    scheduler.scheduler_cls = "kvcompile.serving.vllm.scheduler.SplitScheduler"
    scheduler.async_scheduling = False
    return served


def _set_caching(cache: Any, served: Sequence[PromptRule | None]) -> None:
    """Switch prefix caching off, and say so, where a score counts every query: those of shared blocks are not made."""
    if cache.enable_prefix_caching and remembers(served):
        cache.enable_prefix_caching = False
        names = {rule.selection.policy for rule in served if rule is not None and rule.remembers}
        log.warning("kvcompile: prefix caching is off: %s counts every query of a prompt", ", ".join(sorted(names)))


def _require_supported(config: Any) -> None:
    """Raise KvcompileError for what would see a compacted prompt as a whole one."""
    from kvcompile.serving.vllm import private

    parallel, scheduler, drafts = config.parallel_config, config.scheduler_config, config.speculative_config
    reasons = {
        "its CPU backend: those of GPUs have not been written": not private.current_platform.is_cpu(),
        "no context parallelism": parallel.decode_context_parallel_size * parallel.prefill_context_parallel_size > 1,
        "no KV connector and no offloading, for which blocks are positions": (
            config.kv_transfer_config is not None or config.cache_config.kv_offloading_size is not None
        ),
        "no draft model": drafts is not None and drafts.method != "ngram",
        "its own scheduler": scheduler.scheduler_cls is not None,
        "scheduling in step, not asynchronous": scheduler.async_scheduling is True,
        "a cache in the model's dtype or in fp8": config.cache_config.cache_dtype not in CACHES,
    }
    for rule, wrong in reasons.items():
        if wrong:
            raise KvcompileError("kvcompile in vLLM needs " + rule, "another setting of vLLM")


def _require_heads(served: Served, ranks: int) -> None:
    """Raise KvcompileError where a rank of tensor parallelism would keep other tokens than the whole model."""
    for p in served.plan.selected if ranks > 1 else ():
        if p.kv_heads % ranks:
            raise KvcompileError(
                "each rank must have whole KV heads, with all of their query heads", f"{p.kv_heads} over {ranks} ranks"
            )
        if p.selection is not None and p.selection.score.mixes_heads:
            raise KvcompileError(
                "a rank sees its own heads alone, and this score looks at all of a layer", repr(p.selection.policy)
            )


def _require_room(scheduler: Any, last: int) -> None:
    """Raise KvcompileError where decoding requests could leave no step the room for the last chunk of a prompt."""
    longest = scheduler.long_prefill_token_threshold
    room = scheduler.max_num_batched_tokens - scheduler.max_num_seqs
    if room < last or 0 < longest < last:
        raise KvcompileError(
            f"the last {last} tokens of a prompt are read in one step, beside a token of every other request",
            f"{scheduler.max_num_batched_tokens} tokens a step for {scheduler.max_num_seqs} requests",
            "a larger --max-num-batched-tokens, or a smaller --max-num-seqs",
        )
