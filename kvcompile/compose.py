"""From overrides to a Config, the same way for the command line and for Python."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.errors import CompactHydraException, ConfigCompositionException, MissingConfigException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from kvcompile.config import Config, finish
from kvcompile.doors import registry
from kvcompile.errors import KvcompileError
from kvcompile.stack import discover, first_line, orphan, policy_class, schema, suggest

CONFIG_MODULE, CONFIG_NAME, VERSION_BASE = "kvcompile.conf", "config", "1.3"
ONCE = {"policy": "each policy may be in the stack once", "export": "each door may be in export once"}
CHECKED_JOBS = 64  # of a sweep, composed before its first job starts
_LOCK = threading.RLock()
_STORED: set[str] = set()  # Hydra 1.4 warns about storing twice


class RecipeFolder(SearchPathPlugin):  # type: ignore[misc]
    """Puts the shipped recipes beside our own config; other Hydra applications are left alone.

    `hydra.searchpath` in the config would do for composing, but help and completion do not read it, and a user who
    sets it would lose the recipes.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the package of recipes, if this search path is ours."""
        if any(element.path == f"pkg://{CONFIG_MODULE}" for element in search_path.get_path()):
            search_path.append("kvcompile", "pkg://kvcompile.recipes")


def register() -> None:
    """Give Hydra the recipes, the schema, every installed policy as an option of `policy`, every door of `export`."""
    Plugins.instance().register(RecipeFolder)
    store = ConfigStore.instance()
    if not _STORED:
        store.store(name="kvcompile_schema", node=Config)
    for name in discover().keys() - _STORED:
        store.store(group="policy", name=name, node=schema(policy_class(name)), package=f"stack.{name}")
        _STORED.add(name)
    for name, cls in registry.discover().items():
        if f"export={name}" not in _STORED:
            store.store(group="export", name=name, node=schema(cls), package=f"export.{name}")
            _STORED.add(f"export={name}")


def compose(overrides: Sequence[str] = ()) -> Config:
    """The config that `kvcompile <overrides>` would run. Safe in threads and inside another Hydra application.

    Raises KvcompileError for whatever the command line would refuse, and for a sweep.
    """
    if isinstance(overrides, str):
        raise KvcompileError("overrides are a list", repr(overrides), f"[{overrides!r}]")
    with _own_hydra():
        return _compose(list(overrides))


def check(overrides: Sequence[str], multirun: bool) -> None:
    """Raise KvcompileError if a job of this command line would not compose, before the first one starts."""
    with _own_hydra():
        for job in expand(overrides) if multirun else [list(overrides)]:
            _compose(job, sweeping=True)


def expand(overrides: Sequence[str]) -> Iterator[list[str]]:
    """The jobs of a finite sweep, in order (at most `CHECKED_JOBS`); none where a sweep is over an interval."""
    parsed = _parse(overrides)
    if any(isinstance(o.value(), IntervalSweep) for o in parsed):
        return
    axes = [
        [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()] if o.is_sweep_override() else [text]
        for o, text in zip(parsed, overrides, strict=True)
    ]
    yield from (list(job) for job in itertools.islice(itertools.product(*axes), CHECKED_JOBS))


def resolve(cfg: DictConfig, choices: Mapping[str, Any], overrides: Sequence[str]) -> Config:
    """The finished Config of a composed one. `choices` are Hydra's, `overrides` the task's own.

    Raises KvcompileError for unknown, duplicate or orphan policies and for values out of range.
    """
    parsed = _parse(overrides)
    _one_budget(parsed)
    for override in parsed:
        group = override.key_or_group
        value = override.value() if group in ONCE else None
        named: list[str] = [str(name) for name in value] if isinstance(value, list) else []
        for name in named:
            if named.count(name) > 1:
                raise KvcompileError(ONCE[group], f"{group}=[{','.join(named)}]")
    stack = cfg.stack
    chosen = [str(name) for name in stack if OmegaConf.get_type(stack, name) is not dict]
    for name in stack:
        if name not in chosen:
            raise orphan(str(name), chosen)
    _require_known(cfg, Config)
    try:
        config = cast(Config, OmegaConf.to_object(cfg))
    except OmegaConfBaseException as error:
        raise _one_line(error) from error
    plain = {name: OmegaConf.to_container(cfg[name], resolve=True) for name in ("stack", "export")}
    recipe = choices.get("recipe")
    return finish(Config(**{**vars(config), **plain, "recipe": recipe or config.recipe}))


def _require_known(given: DictConfig, kind: Any, where: str = "") -> None:
    """Raise KvcompileError for what no config has: `+` and `++` add whatever they are given."""
    known = [f.name for f in dataclasses.fields(kind)]
    for name in map(str, given):
        if name not in known:
            raise KvcompileError("unknown setting", repr(where + name), suggest(name, known))
        inner = OmegaConf.get_type(given, name)
        if dataclasses.is_dataclass(inner):
            _require_known(given[name], inner, f"{where}{name}.")


def _one_budget(overrides: Sequence[Override]) -> None:
    """Raise KvcompileError if both the shortcut and a policy's own budget are overridden: one would be lost."""
    given = dict(pair for o in overrides for pair in _leaves(o.get_key_element().lstrip("+~"), o.value()))
    own = [key for key in given if key.startswith("stack.") and key.endswith(".budget")]
    if own and given.get("budget") is not None:
        raise KvcompileError(
            "budget sets the budget of every policy in the stack, so it cannot come with that of one",
            f"budget={given['budget']} and {own[0]}={given[own[0]]}",
            f"drop one of the two, or give each policy its own, as in {own[0]}",
        )


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """`(dotted key, value)` of everything that an override sets."""
    if not isinstance(value, dict):
        yield key, value
        return
    for name, inner in value.items():
        yield from _leaves(f"{key}.{name}", inner)


def _compose(overrides: list[str], sweeping: bool = False) -> Config:
    try:
        cfg = hydra_compose(CONFIG_NAME, overrides, return_hydra_config=True)
        choices, own = cfg.hydra.runtime.choices, list(cfg.hydra.overrides.task)
        if choices.get("sweep") and not sweeping:
            raise KvcompileError("one config has no sweep", f"sweep={choices['sweep']}", "compose each point of it")
        with open_dict(cfg):
            del cfg["hydra"]
        return resolve(cfg, choices, own)
    except KvcompileError:
        raise
    except (CompactHydraException, OmegaConfBaseException, ValueError) as error:
        raise _one_line(error) from error


def _parse(overrides: Sequence[str]) -> list[Override]:
    try:
        parsed: list[Override] = OverridesParser.create().parse_overrides(list(overrides))
    except CompactHydraException as error:
        raise _one_line(error) from error
    return parsed


def _one_line(error: BaseException) -> KvcompileError:
    """Hydra's and OmegaConf's messages as ours: the rule, what was given, the nearest name that exists."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).removesuffix(".yaml").rpartition("/")
        ours: dict[str, Mapping[str, Any]] = {"policy": discover(), "export": registry.DOORS}
        known = ours.get(group) or error.options or []
        kind, _, folder = group.partition("/")
        if kind == "model" and folder:
            return KvcompileError(
                "model names a group of settings", f"{folder}/{name}", f"model.pretrained={folder}/{name}"
            )
        return KvcompileError(f"unknown {group or 'config'}", repr(name), suggest(name, known))
    cause: Any = error.__cause__ if isinstance(error, ConfigCompositionException) else error
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
        parent, key = cause.parent_node, str(cause.key)
        names = [str(k) for k in parent if k != "hydra"] if isinstance(parent, DictConfig) else []
        if cause.full_key == f"stack.{key}":
            return orphan(key, names)
        if cause.full_key == f"export.{key}" and key in registry.DOORS:
            return KvcompileError("options need their door", cause.full_key, f"export=[{','.join([*names, key])}]")
        return KvcompileError("unknown setting", repr(cause.full_key or key), suggest(key, names) if names else None)
    if isinstance(cause, OmegaConfBaseException):
        return KvcompileError(f"{cause.full_key}: {first_line(cause)}" if cause.full_key else first_line(cause))
    fixes = {
        "Ambiguous value": "put -m first to sweep, or [a,b] for a list",
        "missing EQUAL": "write it as <setting>=<value>",
    }
    return KvcompileError(first_line(error), fix=next((fix for part, fix in fixes.items() if part in str(error)), None))


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Hydra initialised with our config only, whatever application is around us; that one's state is put back."""
    with _LOCK:
        register()
        around = GlobalHydra.instance()
        saved, around.hydra = around.hydra, None
        try:
            with initialize_config_module(CONFIG_MODULE, version_base=VERSION_BASE):
                yield
        finally:
            GlobalHydra.instance().hydra = saved
