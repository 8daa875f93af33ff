"""A model of a type that kvcompile does not know, compiled as one of a type that it does (`model.architecture`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvcompile.errors import KvcompileError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

KEY = "architecture"  # of a config's `kvcompile`


def compiled_as(config: PretrainedConfig) -> str:
    """The `model_type` whose architecture a model is compiled by: its own, unless another was named."""
    return str((getattr(config, "kvcompile", None) or {}).get(KEY) or config.model_type)


def name_as(config: PretrainedConfig, architecture: str | None) -> None:
    """Have a model compiled as one of another type, in place; None leaves what was said before."""
    if architecture not in (None, compiled_as(config)):
        config.kvcompile = {**(getattr(config, "kvcompile", None) or {}), KEY: architecture}


def read_config(source: str, architecture: str, options: dict[str, Any]) -> PretrainedConfig:
    """The config of a checkpoint, which is opened with the classes of `architecture` where its own are not known.

    Raises KvcompileError for an architecture that transformers does not have.
    """
    from transformers import AutoConfig, PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if architecture not in CONFIG_MAPPING:
        raise KvcompileError(
            "model.architecture must be a model_type that kvcompile compiles", architecture, "kvcompile ls models"
        )
    said, _ = PretrainedConfig.get_config_dict(source, **options)
    if said.get("model_type") in CONFIG_MAPPING:
        config: PretrainedConfig = AutoConfig.from_pretrained(source, **options)
    else:
        own = {key: value for key, value in said.items() if key not in ("model_type", "architectures", "auto_map")}
        config = CONFIG_MAPPING[architecture].from_dict(own)
        config._name_or_path = source
    name_as(config, architecture)
    return config
