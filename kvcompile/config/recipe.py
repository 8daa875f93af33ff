"""A config as the recipe that an artifact keeps, and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kvcompile.config.schema import RECIPE_NODES, Config
from kvcompile.config.validate import finish
from kvcompile.errors import KvcompileError, first_line


def to_recipe(config: Config) -> str:
    """YAML that recreates exactly this config with `from_recipe`."""
    text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True, width=120)
    return f"# Written by kvcompile. Read it again with kvcompile.config.schema.from_recipe.\n{text}"


def from_recipe(text: str) -> Config:
    """The config that `to_recipe` wrote. Data only: no Hydra, no interpolation, nothing executed.

    Raises KvcompileError for broken YAML, unknown keys, wrong types and values out of range.
    """
    try:
        _require_small(text)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise KvcompileError("a recipe must be YAML", first_line(error)) from error
    if not isinstance(data, dict):
        raise KvcompileError("a recipe must be a YAML mapping", type(data).__name__)
    _refuse_interpolation(data)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), data)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise KvcompileError(f"recipe: {first_line(error)}", getattr(error, "full_key", None)) from error
    return finish(config)


def _require_small(text: str) -> None:
    """Refuse what a few bytes blow up to millions of values, and lists that no model has layers or heads for."""
    nodes = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        nodes += isinstance(event, yaml.NodeEvent)
        if isinstance(event, yaml.AliasEvent):
            raise KvcompileError("a resolved recipe holds plain values", f"the alias *{event.anchor}", "write it out")
        if nodes > RECIPE_NODES:
            raise KvcompileError(f"a recipe has at most {RECIPE_NODES:,} values", "more")


def _refuse_interpolation(value: Any) -> None:
    if isinstance(value, str) and "${" in value:
        raise KvcompileError("a resolved recipe holds plain values", value, "replace the interpolation by its value")
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in items:
        _refuse_interpolation(item)
