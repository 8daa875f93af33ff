"""The command line: `kvcompile recipe=... model=...`, its subcommands (`kvcompile ls`), `--help`, `--version`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.main import get_args_parser
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from kvcompile import compiler
from kvcompile.analysis import registry as analyses
from kvcompile.config import sweep
from kvcompile.config.compose import (
    CONFIG_MODULE,
    CONFIG_NAME,
    FOREIGN,
    VERSION_BASE,
    check,
    one_line,
    register,
    resolve,
)
from kvcompile.config.schema import Config
from kvcompile.errors import KvcompileError
from kvcompile.exporters import registry
from kvcompile.output import named_output, room_to_write, standard_output
from kvcompile.paths import require_here
from kvcompile.plan.policy import Policy
from kvcompile.policies.base import SelectionPolicy
from kvcompile.stack import discover
from kvcompile.tasks import registry as tasks

COMMANDS = ("run", "multirun", "cfg", "info", "shell_completion")  # flags of which Hydra takes one
PIPE_WIDTH = 160
RECOMMENDED = "begin with"
BY_NAME = "model=<name>"
BEGIN_WITH = {  # what won where it was measured: docs/results.md, docs/limits.md
    "no answer may change": "kivi",
    "questions about a text come after it": "attention_matching",
    "the question ends the prompt": "snapkv_kivi",
}
MULTIRUN_MARKS = ("sweep=", "hydra.mode=MULTIRUN")
SUBCOMMANDS = {  # words that come first: what is called with the words behind them
    "ls": "kvcompile.cli:ls",
    "board": "kvcompile.board.command:main",
    "doctor": "kvcompile.doctor.command:main",
    "lm_eval": "kvcompile.lm_eval:main",
    "search": "kvcompile.searching.command:main",
}


def main() -> None:
    """Entry point of the `kvcompile` script. Exits with 1 after an error that the user can mend, on one line."""
    try:
        with standard_output(), room_to_write():
            _command(sys.argv[1:])
    except KvcompileError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(1) from None


def _command(arguments: Sequence[str]) -> None:
    if "--version" in arguments:
        import kvcompile

        sys.stdout.write(f"kvcompile {kvcompile.__version__}\n")
    elif arguments and (place := SUBCOMMANDS.get(arguments[0])):
        module, _, function = place.partition(":")
        getattr(import_module(module), function)(arguments[1:])
    else:
        _hydra(arguments)


def _hydra(arguments: Sequence[str]) -> None:
    require_here()
    register()
    flags = _flags(arguments)
    only_shows = flags.cfg or flags.info or flags.help or flags.hydra_help or flags.shell_completion
    own_config = flags.config_name or flags.config_path or flags.experimental_rerun
    if not only_shows and not own_config:
        check(flags.overrides, flags.multirun or _sweeps(flags.overrides), flags.config_dir)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what it would print, over several lines
    try:
        _app()
    except FOREIGN as error:
        raise error if isinstance(error, KvcompileError) else one_line(error) from error
    except Exception as error:
        if (folder := sweep.SweepFolder.current) is None:
            raise
        raise sweep.interrupted(error, folder) from error
    finally:  # also after an interrupt: the jobs that are done are not lost
        failed, jobs = sweep.summarise(_console())
    if failed:
        sys.exit(f"{failed} of {jobs} jobs failed")


def _flags(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line as Hydra reads it. Raises KvcompileError for flags that it does not take."""
    parser: argparse.ArgumentParser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        fix = "flags come first, settings are written name=value; kvcompile --help shows both"
        raise KvcompileError(f"the command line must be flags, then settings: {message}", fix=fix)

    parser.error = refuse  # type: ignore[method-assign]
    flags = parser.parse_args(list(arguments))
    commands = [f"--{name.replace('_', '-')}" for name in COMMANDS if getattr(flags, name) not in (None, False)]
    if len(commands) > 1:
        refuse(f"only one of {', '.join(commands)} at a time")
    if flags.resolve and not (flags.cfg or flags.help):
        refuse("--resolve goes with --cfg or --help")
    return flags


def _console() -> Console:
    """Standard output; wide where no terminal limits it, so that a pipe loses no column."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)


def _sweeps(overrides: Sequence[str]) -> bool:
    return any(text.startswith(MULTIRUN_MARKS) for text in overrides)


@hydra.main(version_base=VERSION_BASE, config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME)  # type: ignore[untyped-decorator]
def _app(cfg: DictConfig) -> None:
    """One job, as Hydra calls it."""
    context = HydraConfig.get()
    try:
        with room_to_write():
            if context.mode == RunMode.MULTIRUN:
                _sweep_job(cfg, context)
            else:
                _work(resolve(cfg, context.runtime.choices, list(context.overrides.task)))
    except KvcompileError as error:
        sys.exit(f"{error}")  # raised further, Hydra would put a line of its own before it


def _sweep_job(cfg: DictConfig, context: DictConfig) -> None:
    """One job of a sweep: whatever becomes of it is written into its folder, as far as there is room for that.

    A worker of a cluster starts anywhere: paths are those of where the command was given.
    """
    overrides, number = list(context.overrides.task), int(context.job.num)
    start = Path(context.runtime.cwd)
    folder = start / context.sweep.dir / str(context.sweep.subdir)
    if not context.job.chdir:
        _enter(start)

    def work() -> sweep.Done:
        config = resolve(cfg, context.runtime.choices, overrides)
        place = Path(cfg.output, str(number)) if cfg.output else folder / config.label
        return _work(replace(config, output=str(place)))

    one_by_one = str(context.launcher._target_).endswith(".BasicLauncher")
    settings = "" if cfg.tasks else sweep.digest(cfg)  # jobs of tasks find their rows
    with nullcontext() if one_by_one else named_output(f"job {number} | "):
        sweep.run_job(folder, number, overrides, work, settings)


def _enter(folder: Path) -> None:
    """Work in a folder. Raises KvcompileError where this machine does not have it."""
    try:
        os.chdir(folder)
    except OSError as error:
        fix = "start the sweep in a folder that all of them share"
        raise KvcompileError("the folder of a sweep must be there on every machine", folder, fix) from error


def _work(config: Config) -> sweep.Done:
    """Compile, or only plan, export or analyse; returns (output folder, summary row)."""
    if config.analysis:
        from kvcompile.job import analyse_config

        analysed = analyse_config(config, _console())
        return analysed.path, analysed.summary
    if config.tasks:
        from kvcompile.board import standings, tables
        from kvcompile.tasks.run import evaluate_config

        console = _console()
        return evaluate_config(config, console, lambda rows: tables.show(standings.board(rows), console))
    if config.artifact:
        return _export(config.artifact, config)
    if config.plan.mode == "only":
        from kvcompile.report import plan_table

        stack = compiler.plan_config(config)
        plan_table.show(stack.plan, config, _console(), stack.policies)
        return None, plan_table.summary(stack.plan, config)
    from kvcompile.job import compile_config

    outcome = compile_config(config)
    return outcome.path, outcome.summary


def _export(artifact: str, config: Config) -> sweep.Done:
    """Export what lies in an artifact, each exporter into its folder below `output`."""
    from kvcompile.exporters.write import opened, write_new
    from kvcompile.progress import progress_bar
    from kvcompile.report.units import size

    summary: dict[str, sweep.Cell] = {}
    with progress_bar() as progress:
        model, tokenizer, measured = opened(artifact)
        registry.require_open(config.exporters(), model.kvcompile.plan, model.config)
        for exporter in config.exporters():
            folder = Path(str(config.output), exporter.name)
            done = write_new(exporter, model, tokenizer, folder, measured, progress)
            summary[f"{exporter.name}_bytes"] = done.bytes
            line = f"export {exporter.name}: {folder}, {size(done.bytes)}"
            _console().print(line, markup=False, highlight=False, soft_wrap=True)
    return config.output, summary


def ls(kinds: Sequence[str]) -> None:
    """Print what `listing` says."""
    sys.stdout.write(f"{listing(kinds)}\n")


def listing(kinds: Sequence[str]) -> str:
    """`kvcompile ls [recipes|policies|models|exports|analyses|tasks]`: a line each. Raises KvcompileError otherwise."""
    listed: dict[str, Callable[[], dict[str, str]]] = {
        "recipes": lambda: _headers("kvcompile.recipes", "recipe"),
        "policies": lambda: {name: f"{cls.family}: {cls.summary}{_unit(cls)}" for name, cls in discover().items()},
        "models": _models,
        "exports": lambda: {name: cls.summary for name, cls in registry.discover().items()},
        "analyses": lambda: {name: cls.summary for name, cls in analyses.discover().items()},
        "tasks": lambda: {name: cls.summary for name, cls in tasks.discover().items()},
    }
    for kind in kinds:
        if kind not in listed:
            raise KvcompileError("kvcompile ls lists " + ", ".join(listed), repr(kind))
    known = {kind: listed[kind]() for kind in kinds or listed}
    width = max(len(name) for entries in known.values() for name in entries)
    blocks = []
    for kind in known:
        blocks.append("\n".join([kind, *(f"  {name:{width}}  {line}" for name, line in known[kind].items())]))
        if kind == "recipes":
            blocks[-1] += "".join(f"\n  {RECOMMENDED:{width}}  {wish}: {name}" for wish, name in BEGIN_WITH.items())
        if kind == "models":
            named = ", ".join(_headers(CONFIG_MODULE, "model"))
            blocks[-1] += f"\n  {BY_NAME:{width}}  {named}; any other by model.pretrained=<folder, GGUF file or hub id>"
    return "\n\n".join(blocks)


def _models() -> dict[str, str]:
    from kvcompile.adapters.catalogue import catalogue  # imports torch

    return catalogue()


def _unit(policy: type[Policy]) -> str:
    """What is said of a policy whose scores may mean something else in every layer."""
    if not issubclass(policy, SelectionPolicy) or policy().score().comparable:
        return ""
    return " (scores of different layers do not compare)"


def _headers(package: str, group: str) -> dict[str, str]:
    """The first comment line of every YAML file of a group."""
    headers = {}
    for file in sorted(files(package).joinpath(group).iterdir(), key=lambda f: f.name):
        lines = (line.removeprefix("#").strip() for line in file.read_text("utf-8").splitlines() if line[:1] == "#")
        headers[file.name.removesuffix(".yaml")] = next((line for line in lines if not line.startswith("@")), "")
    return headers
