"""From overrides to a Config, the same way for the command line and for Python."""

from __future__ import annotations

import dataclasses
import itertools
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from kvcompile.analysis import registry as analyses
from kvcompile.config.schema import OPTIONS, Config
from kvcompile.config.validate import finish
from kvcompile.errors import KvcompileError, first_line
from kvcompile.exporters import registry
from kvcompile.options import schema, suggest
from kvcompile.stack import discover, orphan
from kvcompile.tasks import registry as tasks


@dataclasses.dataclass(frozen=True)
class Group:
    """A group of the command line whose options are those of classes found by name.

    discover: gives the classes by name. where: under which their options stand. one: what one is called in a sentence.
    """

    discover: Callable[[], Mapping[str, type[Any]]]
    where: str
    one: str


GROUPS = {
    "policy": Group(discover, "stack", "policy"),
    "export": Group(registry.discover, "export", "exporter"),
    "analysis": Group(analyses.discover, "analysis", "analysis"),
    "evaluate": Group(tasks.discover, "tasks", "task"),
}
CONFIG_MODULE, CONFIG_NAME, VERSION_BASE = "kvcompile.conf", "config", "1.3"
FOREIGN = (HydraException, OmegaConfBaseException, yaml.YAMLError)  # what `one_line` makes ours
CHECKED_JOBS = 64  # of a sweep, composed before its first job starts
EXTRAS = {"joblib": "joblib", "ray": "ray", "submitit_slurm": "slurm", "submitit_local": "slurm"}  # of launchers
PLUGINS = {
    "hydra/launcher": "pip install 'kvcompile[joblib]' for hydra/launcher=kv_joblib",
    "hydra/sweeper": "pip install hydra-optuna-sweeper for hydra/sweeper=optuna",
}
FIXES = {  # of Hydra's messages, by a part of them
    "Ambiguous value": "put -m first to sweep, or [a,b] for a list",
    "Could not override '": "a recipe begins with the line '# @package _global_'; its defaults say 'override /policy'",
    "not support sweep type": "list the values (a,b,c), or use a sweeper that takes intervals: hydra/sweeper=optuna",
    "Primary config directory": "--config-dir <folder>, which adds to our configs instead of replacing them",
}
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
    """Give Hydra the recipes, the schema, and every policy, exporter, analysis and task as an option of its group."""
    Plugins.instance().register(RecipeFolder)
    store = ConfigStore.instance()
    if not _STORED:
        store.store(name="kvcompile_schema", node=Config)
    for group, options in GROUPS.items():
        for name, cls in options.discover().items():
            if f"{group}={name}" not in _STORED:
                store.store(group=group, name=name, node=schema(cls), package=f"{options.where}.{name}")
                _STORED.add(f"{group}={name}")


def compose(overrides: Sequence[str] = ()) -> Config:
    """The config that `kvcompile <overrides>` would run. Safe in threads and inside another Hydra application.

    Raises KvcompileError for whatever the command line would refuse, and for a sweep.
    """
    with _own_hydra():
        return _compose([overrides] if isinstance(overrides, str) else list(overrides))


def check(overrides: Sequence[str], multirun: bool, folder: str | None = None) -> None:
    """Raise KvcompileError if a job of this command line would not compose, before the first one starts.

    folder: of the user's own configs (`--config-dir`).
    """
    own = searched(folder)
    with _own_hydra():
        if not multirun:
            _compose([*own, *overrides], sweeping=True)
            return
        for number, job in enumerate(expand([*own, *overrides])):
            _compose(job, sweeping=True, job=number)


def searched(folder: str | None) -> list[str]:
    """Overrides that have the user's own configs found (`--config-dir`). Raises KvcompileError where there are none."""
    if folder and not Path(folder).is_dir():
        raise KvcompileError("--config-dir must name a folder that is there", folder)
    return [f"hydra.searchpath=['file://{Path(folder).absolute()}']"] if folder else []


def option(group: str, name: str, folder: str | None = None) -> dict[str, Any]:
    """What one file of a group says, with its own defaults list: `conf/<group>/<name>.yaml`, or that of the user's.

    Raises KvcompileError for a name that there is not, and for a file that is no mapping.
    """
    with _own_hydra():
        try:
            settings = hydra_compose(None, [*searched(folder), f"+{group}@_global_={name}"])
            content = OmegaConf.to_container(settings, resolve=True)
        except FOREIGN as error:
            raise one_line(error) from error
    return cast(dict[str, Any], content)


def expand(overrides: Sequence[str]) -> Iterator[list[str]]:
    """The jobs of a finite sweep, in order (at most `CHECKED_JOBS`); none where a sweep is over an interval.

    Raises KvcompileError for a glob that matches nothing.
    """
    parsed = _parse(overrides)
    if any(isinstance(o.value(), IntervalSweep) for o in parsed):
        return
    axes = [
        [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()] if o.is_sweep_override() else [text]
        for o, text in zip(parsed, overrides, strict=True)
    ]
    for axis, text in zip(axes, overrides, strict=True):
        if not axis:
            raise KvcompileError("a sweep must have values", f"{text}, which matches none", "kvcompile ls")
    yield from (list(job) for job in itertools.islice(itertools.product(*axes), CHECKED_JOBS))


def resolve(cfg: DictConfig, choices: Mapping[str, Any], overrides: Sequence[str]) -> Config:
    """The finished Config of a composed one. `choices` are Hydra's, `overrides` the task's own.

    Raises KvcompileError for unknown, duplicate or orphan policies and for values out of range.
    """
    parsed = _parse(overrides)
    _one_budget(parsed)
    for override in parsed:
        group = override.key_or_group
        value = override.value() if group in GROUPS else None
        named: list[str] = [str(name) for name in value] if isinstance(value, list) else []
        for name in named:
            if named.count(name) > 1:
                place = "the stack" if group == "policy" else group
                raise KvcompileError(f"each {GROUPS[group].one} may be in {place} once", f"{group}=[{','.join(named)}]")
    recipe, replaced = str(choices.get("recipe") or ""), any(o.key_or_group == "policy" for o in parsed)
    stack = cfg.stack
    chosen = [str(name) for name in stack if OmegaConf.get_type(stack, name) is not dict]
    for name in stack:
        if name not in chosen:
            typed = any(o.key_or_group.startswith(f"stack.{name}") for o in parsed)
            left_out = recipe and replaced and not typed
            raise _left_out(recipe, str(name), chosen) if left_out else orphan(str(name), chosen)
    _require_known(cfg, Config)
    if recipe:
        cfg.recipe = f"{recipe}+{'+'.join(chosen) or 'dense'}" if replaced and chosen != [recipe] else recipe
    try:
        config = cast(Config, OmegaConf.to_object(cfg))
    except OmegaConfBaseException as error:
        raise one_line(error) from error
    _require_set(cfg)
    plain = {name: OmegaConf.to_container(cfg[name], resolve=True) for name in OPTIONS}
    return finish(Config(**{**vars(config), **plain}))


def _left_out(recipe: str, name: str, chosen: Sequence[str]) -> KvcompileError:
    return KvcompileError(
        f"policy=[...] takes the place of the policies of recipe={recipe}, which sets options of {name!r}",
        f"policy=[{','.join(chosen)}] without it",
        f"policy=[{','.join([*chosen, name])}], or leave recipe={recipe} out",
    )


def _require_set(cfg: DictConfig) -> None:
    """Raise KvcompileError where `${...}` inside a text names a setting that is null: it would be the word None."""
    for key, value in _leaves("", OmegaConf.to_container(cfg, resolve=False)):
        for name in re.findall(r"\$\{((?:hydra:)?[\w.]+)\}", value) if isinstance(value, str) else ():
            of = HydraConfig.get() if name.startswith("hydra:") else cfg
            if value != f"${{{name}}}" and OmegaConf.select(of, name.removeprefix("hydra:")) is None:
                got = f"{key.lstrip('.')}={value}, where {name} is null"
                raise KvcompileError("a text may only name settings that are set", got, f"set {name}, or leave it out")


def _require_known(settings: DictConfig, kind: Any, where: str = "") -> None:
    """Raise KvcompileError for what no config has: `+` and `++` add whatever they are given."""
    known = [f.name for f in dataclasses.fields(kind)]
    for name in map(str, settings):
        if name not in known:
            raise KvcompileError("unknown setting", repr(where + name), suggest(name, known))
        inner = OmegaConf.get_type(settings, name)
        if dataclasses.is_dataclass(inner):
            _require_known(settings[name], inner, f"{where}{name}.")


def _one_budget(overrides: Sequence[Override]) -> None:
    """Raise KvcompileError if both the shortcut and a policy's own budget are overridden: one would be lost."""
    values = dict(pair for o in overrides for pair in _leaves(o.get_key_element().lstrip("+~"), o.value()))
    own = [key for key in values if key.startswith("stack.") and key.endswith(".budget")]
    if own and values.get("budget") is not None:
        raise KvcompileError(
            "budget sets the budget of every policy in the stack, so it cannot come with that of one",
            f"budget={values['budget']} and {own[0]}={values[own[0]]}",
            f"drop one of the two, or give each policy its own, as in {own[0]}",
        )


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """`(dotted key, value)` of everything that an override sets."""
    if not isinstance(value, dict):
        yield key, value
        return
    for name, inner in value.items():
        yield from _leaves(f"{key}.{name}", inner)


def _compose(overrides: list[str], sweeping: bool = False, job: int | None = None) -> Config:
    """The config of one job; job: its number in a sweep, for `${hydra:job.num}`."""
    try:
        cfg = hydra_compose(CONFIG_NAME, overrides, return_hydra_config=True)
        _set_hydra(cfg, job)
        choices, own = cfg.hydra.runtime.choices, list(cfg.hydra.overrides.task)
        if choices.get("sweep") and not sweeping:
            raise KvcompileError(
                "a single config cannot hold a sweep",
                f"sweep={choices['sweep']}",
                "compose the config of each job by itself, or run the sweep as kvcompile -m",
            )
        with open_dict(cfg):
            del cfg["hydra"]
        return resolve(cfg, choices, own)
    except KvcompileError:
        raise
    except (*FOREIGN, ValueError) as error:
        raise one_line(error) from error


def _set_hydra(cfg: DictConfig, job: int | None) -> None:
    """What `${hydra:...}` is read from, as Hydra sets it when a job starts."""
    with open_dict(cfg.hydra):
        cfg.hydra.runtime.output_dir = cfg.hydra.run.dir
        if job is not None:
            cfg.hydra.job.num, cfg.hydra.job.id = job, str(job)
    HydraConfig.instance().set_config(cfg)


def _parse(overrides: Sequence[str]) -> list[Override]:
    try:
        around = GlobalHydra.instance()  # a glob asks it for the options of a group
        loader = around.config_loader() if around.is_initialized() else None
        parsed: list[Override] = OverridesParser.create(loader).parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise _unreadable(error) from error
    except HydraException as error:
        raise one_line(error) from error
    return parsed


def _unreadable(error: OverrideParseException) -> KvcompileError:
    """The error about an override that Hydra's grammar does not take: most often, what to put in quotes."""
    key, equals, value = error.override.partition("=")
    if not equals:
        return KvcompileError("a setting must be given a value", error.override, f"write it as {key}=<value>")
    quoted = "'{}=\"{}\"'".format(key, value.replace('"', '\\"'))
    return KvcompileError(
        "a value with one of = # ~ ( ) [ ] { } , or letters beyond a-z must be in quotes of its own",
        error.override,
        f"{quoted}, with both pairs of quotes",
    )


def one_line(error: BaseException) -> KvcompileError:
    """What Hydra, OmegaConf and YAML raise about a mistake, as ours: the rule, what was given, the nearest name."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing(str(error.missing_cfg_file), error.options or [])
    cause: Any = (error.__cause__ or error.__context__) if isinstance(error, ConfigCompositionException) else error
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
        parent, key = cause.parent_node, str(cause.key)
        names = [str(k) for k in parent if k != "hydra"] if isinstance(parent, DictConfig) else []
        if cause.full_key == f"stack.{key}":
            return orphan(key, names)
        for group, options in GROUPS.items():
            if cause.full_key == f"{options.where}.{key}" and key in options.discover():
                article = "an" if options.one[0] in "aeiou" else "a"
                rule = f"options of {article} {options.one} need it in {group}=[...]"
                return KvcompileError(rule, cause.full_key, f"{group}=[{','.join([*names, key])}]")
        return KvcompileError("unknown setting", repr(cause.full_key or key), suggest(key, names) if names else None)
    if isinstance(cause, OmegaConfBaseException):
        return KvcompileError(f"{cause.full_key}: {first_line(cause)}" if cause.full_key else first_line(cause))
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark
        got = f"{error.problem}, {mark.name}, line {mark.line + 1}" if mark else error.problem
        return KvcompileError("a config file must be YAML", got)
    if isinstance(error, OverrideParseException):
        return _unreadable(error)
    return KvcompileError(first_line(error), fix=next((fix for part, fix in FIXES.items() if part in str(error)), None))


def _missing(file: str, options: Sequence[str]) -> KvcompileError:
    """The error about a name that a group does not have, or a group that there is not."""
    group, _, name = file.removesuffix(".yaml").rpartition("/")
    known = GROUPS[group].discover() if group in GROUPS else options
    kind, _, folder = group.partition("/")
    if not group:
        return KvcompileError(
            "there is one main config",
            f"--config-name {name}",
            "put settings of your own into D/recipe/x.yaml, and give --config-dir D recipe=x",
        )
    if group == "hydra/launcher" and name in EXTRAS:
        fix = f"pip install 'kvcompile[{EXTRAS[name]}]'"
        return KvcompileError("this launcher needs a plugin of Hydra", f"none called {name!r}", fix)
    if group in PLUGINS:
        fix = f"{suggest(name, known)}; others come with packages, e.g. {PLUGINS[group]}"
        return KvcompileError(f"a {kind} {folder} must be installed", repr(name), fix)
    if kind == "model" and folder:
        return KvcompileError(
            "model names a group of settings", f"{folder}/{name}", f"model.pretrained={folder}/{name}"
        )
    return KvcompileError(
        f"unknown {GROUPS[group].one if group in GROUPS else group}", repr(name), suggest(name, known)
    )


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Hydra initialised with our config only, whatever application is around us; that one's state is put back."""
    with _LOCK:
        register()
        around, settings = GlobalHydra.instance(), HydraConfig.instance()
        saved, around.hydra, saved_settings = around.hydra, None, settings.cfg
        try:
            with initialize_config_module(CONFIG_MODULE, job_name="kvcompile", version_base=VERSION_BASE):
                yield
        finally:
            GlobalHydra.instance().hydra, HydraConfig.instance().cfg = saved, saved_settings
