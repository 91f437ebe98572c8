"""`distbelief config`: what a job takes, and where each of its values comes from."""

import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from distbelief.commands.run_argument import KEY, KEY_VALUE, find, run_dir_option
from distbelief.problem import Problem
from distbelief.settings import PROJECT_FILE, Said, Settings, gather

if TYPE_CHECKING:
    from distbelief.key import Key

_F = TypeVar("_F", bound=Callable[..., None])


def _settings_options(command: _F) -> _F:
    """--config and --set, as `launch` has them."""
    command = click.option(
        "--set",
        "sets",
        multiple=True,
        metavar="KEY=VALUE",
        type=KEY_VALUE,
        help="As launch would be given it.",
    )(command)
    return click.option(
        "--config",
        "configs",
        multiple=True,
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="A file of settings; again for more, the later winning.",
    )(command)


@click.group("config")
def config_group() -> None:
    """Make, show, explain and check the settings of a job."""


@config_group.command("init", short_help="Write a distbelief.toml to start from.")
@click.option("--force", is_flag=True, help="Replace the file that is there.")
def init_command(force: bool) -> None:
    """Write distbelief.toml here, with every key, its default and what it means.

    Every line is a comment: take away the # of those that should say something else.

    \b
    Example:
      distbelief config init && $EDITOR distbelief.toml
    """
    file = Path(PROJECT_FILE)
    if file.exists() and not force:
        raise Problem("DB-USE-007", f"{file} is there already", fix="to lose what it says: --force")
    try:
        file.write_text(template(), encoding="utf-8")
    except OSError as error:
        raise Problem("DB-STORE-004", f"{file} cannot be written: {error}") from error
    click.echo(f"wrote {file}; it is read by every distbelief command in this folder")


@config_group.command("show", short_help="Print the settings as TOML.")
@click.argument("what", required=False, metavar="[RUN | FILE]")
@_settings_options
@run_dir_option
def show_command(
    what: str | None, configs: tuple[Path, ...], sets: tuple[str, ...], run_dir: Path | None
) -> None:
    """Print all settings as TOML: those that `launch` would take here, or with FILE, or RUN's.

    \b
    Examples:
      distbelief config show --set train.lr=0.1
      distbelief config show b834 > again.toml
    """
    from distbelief.job import compose

    if what is not None and not what.endswith(".toml"):
        settings = gather(configs, sets=sets, base=find(what, run_dir).config)
    else:
        files = (*configs, Path(what)) if what else configs
        settings = gather(files, sets=sets, environ=os.environ)
    for source in settings.sources:
        click.echo(f"# {source}")
    click.echo(compose(settings).to_toml(), nl=False)


@config_group.command("explain", short_help="Where the value of a key comes from.")
@click.argument("key", type=KEY)
@_settings_options
def explain_command(key: str, configs: tuple[Path, ...], sets: tuple[str, ...]) -> None:
    """Say what KEY (or each key of a section) is, where that comes from, and what it means.

    \b
    Example:
      distbelief config explain train.n_push --set train.n_push=2
    """
    from distbelief.job import compose
    from distbelief.key import find_keys

    settings = gather(configs, sets=sets, environ=os.environ)
    keys = find_keys(key)
    compose(settings)
    is_one = len(keys) == 1
    for found in keys:
        name = "" if is_one else f"{found.name}  "
        click.echo(f"{name}{explain(found, settings)}")
        if is_one:
            click.echo(textwrap.indent(textwrap.fill(found.meaning, 76), "    "))


@config_group.command("validate", short_help="Say everything that is wrong.")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@_settings_options
def validate_command(file: Path | None, configs: tuple[Path, ...], sets: tuple[str, ...]) -> None:
    """Check FILE, or without it all that `launch` would read here; say everything that is wrong.

    Exit code 0 or 2. Models and data are not opened: launch --dry-run does that.

    \b
    Example:
      distbelief config validate job.toml
    """
    from distbelief.job import find_problems

    files = configs if file is None else (*configs, file)
    settings = gather(files, sets=sets, environ=os.environ if file is None else None)
    problems = find_problems(settings)
    for problem in problems:
        click.echo(problem.text, err=True)
    if problems:
        sys.exit(2)
    click.echo(f"{', '.join(settings.sources) or 'nothing is set: all defaults'}: no mistakes")


def explain(key: "Key", settings: Settings) -> str:
    """`2   from --set (default 1; distbelief.toml:14 said 4)`."""
    said = settings.about(key.name)
    default = f"default {toml_value(key.default)}"
    if not said:
        return f"{toml_value(key.default)}   the default"
    value: Any = settings.data()  # TOML
    for name in key.name.split("."):
        value = value[name]
    others = [default, *(f"{s.where} said {_what(s, key)}" for s in reversed(said[:-1]))]
    return f"{toml_value(value)}   from {said[-1].where} ({'; '.join(others)})"


def toml_value(value: Any) -> str:  # Any: TOML
    """As it would stand in a file on one line."""
    import tomli_w

    if value is None:
        return "unset"
    if isinstance(value, dict):
        inside = ", ".join(f"{k} = {toml_value(v)}" for k, v in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").rstrip("\n")


def template() -> str:
    """The file that `init` writes."""
    from distbelief.key import all_keys

    return "\n".join(_template_lines(all_keys())) + "\n"


def _template_lines(keys: "tuple[Key, ...]") -> Iterator[str]:
    yield "# Settings of distbelief for runs launched in this folder. Each line shows a default;"
    yield "# take away its # to say something else. Paths start from where launch is called."
    section = ""
    for key in keys:
        *path, name = key.name.split(".")
        if ".".join(path) != section:
            section = ".".join(path)
            yield f"\n[{section}]"
        yield ""
        yield from textwrap.wrap(key.meaning, 98, initial_indent="# ", subsequent_indent="# ")
        # A key without a default of its own has no value that could stand here.
        yield f"#{name} = {'...' if key.default is None else toml_value(key.default)}"


def _what(said: Said, key: "Key") -> str:
    return toml_value(said.value) if said.key == key.name else f"{said.key} = {said.value!r}"
