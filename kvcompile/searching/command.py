"""`kvcompile search ...` and `kvcompile.search(...)`: settings, a model, a search, and what it found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvcompile.errors import KvcompileError
from kvcompile.progress import Progress, silent

if TYPE_CHECKING:
    from kvcompile.config.schema import Config
    from kvcompile.searching.run import Result
    from kvcompile.searching.space import Space

FOLDER = "--config-dir"
PIPE_WIDTH = 160  # columns where no terminal limits them
HELP = """\
kvcompile search [--config-dir D] model=llama search.bytes=1/24 search.minutes=60
kvcompile search model=llama search.quality=0.95
kvcompile search model=llama

The best stack for a number of bytes, the fewest bytes that keep a quality, or, with both open, the front of both.
Settings: search.<name>=<value>; docs/search.md explains them. D/search/x.yaml is your own search.space=x.
The question comes after the cache is made (question=hidden), unless question=seen or both. evaluate=[...] names tasks.
"""


def main(arguments: Sequence[str]) -> None:
    """The subcommand. Raises KvcompileError for what no search can be of."""
    from rich.console import Console

    from kvcompile.models.loading import config_of, load
    from kvcompile.progress import progress_bar
    from kvcompile.searching.run import search_model, target
    from kvcompile.searching.write import show, write

    if any(word in ("-h", "--help") for word in arguments):
        print(HELP, end="")
        return
    folder, overrides = _parsed(arguments)
    config, space = settings(overrides, folder)
    target(config)  # what cannot be written, or be of this model, fails before weights are read
    architecture = config_of(config.model)
    said: list[str] = []
    with progress_bar() as progress:
        model, tokenizer = load(config.model, progress, architecture)
        result = search_model(model, tokenizer, config, space, progress, said.append)
    write(result, config)
    console = Console(width=None if Console().is_terminal else PIPE_WIDTH)
    for line in said:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    show(result, config, console)


def search(
    model: Any, tokenizer: Any = None, overrides: Sequence[str] = (), progress: Progress = silent, **wanted: Any
) -> Result:
    """Find the stack that suits a wish: most quality for a number of bytes, or fewest bytes for a quality.

    Args:
        model: a loaded transformers causal LM, which stays as it is; or the name of a model that `kvcompile ls` lists.
        tokenizer: the model's own.
        overrides: settings as on the command line, such as `output=mine` and `search.space=default`.
        progress: gets how far it is.
        wanted: settings of `search.` by their names: `bytes=1/24`, `quality=0.95`, `minutes=5`, `tokens=2048`.

    Returns:
        The stack, the front and the proof. `result.overrides` are what `kvcompile.compile` takes.

    Raises:
        KvcompileError: for a wish, a model or a space that no search can be of, and where no stack can be.

    Examples:
        >>> where = ["kernels=sdpa", f"output={folder}", "search.rungs=[1]"]
        >>> result = kvcompile.search(model, tokenizer, where, bytes=1 / 4, tokens=128, minutes=0.02)
        >>> result.best.share <= 1 / 4
        True
        >>> small = kvcompile.compile(model, overrides=result.overrides, tokenizer=tokenizer)
    """
    from kvcompile.searching.run import search_model
    from kvcompile.searching.write import write

    given = [overrides] if isinstance(overrides, str) else list(overrides)
    given += [f"search.{name}={_text(value)}" for name, value in wanted.items()]
    if isinstance(model, str):
        given.append(f"model={model}")
    config, space = settings(given)
    if isinstance(model, str):
        from kvcompile.models.loading import load

        model, tokenizer = load(config.model)
    if tokenizer is None:
        raise KvcompileError("a search asks questions, so it needs a tokenizer", "none", "pass tokenizer=")
    result = search_model(model, tokenizer, config, space, progress)
    write(result, config)
    return result


def settings(overrides: Sequence[str], folder: str | None = None) -> tuple[Config, Space]:
    """The checked settings, and the space; folder: of the user's own ones.

    Raises KvcompileError where a stack, or something else than a search, is asked for.
    """
    from dataclasses import replace

    from kvcompile.config.compose import compose, option, searched
    from kvcompile.searching.space import parse

    output = [text for text in overrides if text.startswith("output=")]  # composed, it would be that of an evaluation
    config = compose([*searched(folder), *(text for text in overrides if text not in output)])
    others: dict[str, Any] = {"recipe or policy": config.stack, "export": config.export, "analysis": config.analysis}
    others |= {"artifact": config.artifact, "plan=only": config.plan.mode == "only"}
    others |= {"model.weights": config.model.weights}
    for name, value in others.items():
        if value:
            raise KvcompileError("kvcompile search finds the stack itself, and nothing else is done", name, "drop it")
    typed = {text.partition("=")[0] for text in overrides}
    place = output[-1].partition("=")[2].strip("'\"") if output else f"outputs/search-{config.model.name}"
    config = replace(config, output=place)
    if "question" not in typed:
        config = replace(config, question="hidden")
    space = parse(config.search.space, option("search", config.search.space, folder))
    return config, replace(space, tasks=config.tasks) if config.tasks else space


def _parsed(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The folder of the user's own configs, and the settings."""
    words, folder = list(arguments), None
    for flag in ("-cd", FOLDER):
        if flag in words:
            at = words.index(flag)
            if at + 1 == len(words):
                raise KvcompileError(f"{FOLDER} must name a folder", "nothing")
            folder = words.pop(at + 1)
            words.pop(at)
    if flags := [word for word in words if word.startswith("-")]:
        raise KvcompileError(f"kvcompile search takes one flag, {FOLDER}", flags[0], "settings are written name=value")
    return folder, words


def _text(value: Any) -> str:
    if value is None:
        return "null"
    return f"[{','.join(map(str, value))}]" if isinstance(value, (list, tuple)) else str(value)
