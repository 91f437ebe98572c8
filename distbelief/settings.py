"""Settings: what was said of a job's keys, where it was said, and which of it counts.

The later of these wins: the user's file (~/.config/distbelief/config.toml), the project's
(./distbelief.toml, or [tool.distbelief] of ./pyproject.toml), files that were named, environment
variables (DISTBELIEF_TRAIN__N_PUSH is train.n_push), flags and `--set`. The environment and the
files nobody named belong to the command line: a job made in Python does not see them.

Nothing here knows which keys a job has, so a command that needs only `run_dir` loads no torch.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distbelief.problem import Problem

FLAGS: Mapping[str, str] = {
    "model": "model.factory",
    "data": "data.source",
    "engine": "engine",
    "address": "address",
    "workers": "workers",
    "shards": "shards",
    "batch_size": "train.batch_size",
    "lr": "train.lr",
    "optimizer": "train.optimizer",
    "width": "model.width",
    "n_fetch": "train.n_fetch",
    "n_push": "train.n_push",
    "fetch_policy": "train.fetch_policy",
    "until": "until",
    "seed": "seed",
    "run_dir": "run_dir",
    "dashboard": "monitor.on",
    "allow_actions": "monitor.actions",
    "log": "monitor.log",
}
"""Flag, as Python spells it -> key of the job."""

RECIPES = Path(__file__).with_name("recipes")
PROJECT_FILE = "distbelief.toml"
ENV_PREFIX = "DISTBELIEF_"
NOT_OURS = ("DISTBELIEF_TEST_", "DISTBELIEF_REQUIRE_DATA")
"""Variables of the tests and of CI, which are no keys."""
SCRIPT_SAYS = ("model", "data", "train", "until")
"""What a script says itself; keys of these sections have no meaning beside one."""
BESIDE_SCRIPTS = (("train", "log_grad_norm"),)
"""Except these."""

_HEADER = re.compile(r"\s*\[\s*([^\[\]]+?)\s*\]")
_KEY = re.compile(r"""\s*([A-Za-z0-9_.'"\- ]+?)\s*=""")


class KeyProblem(Problem):
    """A key that is unknown, or whose value does not fit."""

    def __init__(
        self, key: str, what: str, fix: str = "", why: str = "", code: str = "DB-USE-001"
    ) -> None:
        """key: empty if it cannot be told."""
        super().__init__(code, what, why, fix)
        self.key = key


@dataclass(frozen=True, slots=True)
class Said:
    """One value for one key, and where it was said."""

    path: tuple[str, ...]
    value: Any  # TOML
    where: str
    """--set, --workers, DISTBELIEF_WORKERS, or file:line."""
    is_meant: bool = True
    """Said for this run, not in a file that is always read."""

    @property
    def key(self) -> str:
        return ".".join(self.path)


@dataclass(frozen=True, slots=True)
class Settings:
    """All that was said, the later winning."""

    said: tuple[Said, ...] = ()
    sources: tuple[str, ...] = ()
    """The files and variables that were read, the later winning."""

    def data(self) -> dict[str, Any]:  # Any: TOML
        """What counts, as one TOML document.

        Raises: Problem if a key is a value here and a section there.
        """
        data: dict[str, Any] = {}
        for said in self.said:
            *path, last = said.path
            section = data
            for name in path:
                section = section.setdefault(name, {})
                if not isinstance(section, dict):
                    raise KeyProblem(
                        said.key,
                        f"{said.key}: {name} is a value, not a section",
                        why=f"{said.where} says {said.key} = {said.value!r}",
                    )
            section[last] = said.value
        return data

    def about(self, key: str) -> list[Said]:
        """What was said of a key, of its section, or of something in it; the last one counts."""
        path = tuple(key.split("."))
        return [
            s for s in self.said if s.path == path[: len(s.path)] or path == s.path[: len(path)]
        ]

    def without(self, key: str) -> "Settings":
        """As if nobody had said anything of a key."""
        gone = self.about(key)
        return Settings(tuple(s for s in self.said if s not in gone), self.sources)

    def for_script(self) -> "Settings":
        """Without what a script says itself, where files that are always read said it.

        The same if there is no script. Raises: Problem if it was said for this run.
        """
        script = self.about("script.path")
        if not script or not script[-1].value:
            return self
        beside = [s for s in self.said if s.path[0] in SCRIPT_SAYS and s.path not in BESIDE_SCRIPTS]
        for said in beside:
            if said.is_meant:
                raise KeyProblem(
                    said.key,
                    f"{said.key} has no meaning beside a script",
                    "say it in the script, such as Downpour(lr=...), or in its own arguments "
                    "after --",
                    f"{said.where} says it, but model, data and training are the script's",
                    "DB-USE-005",
                )
        return Settings(tuple(s for s in self.said if s not in beside), self.sources)


def recipe(name: str) -> Path:
    """The file of a recipe that comes with us. Raises: Problem with the names that there are."""
    names = sorted(file.stem for file in RECIPES.glob("*.toml"))
    if name not in names:
        raise Problem(
            "DB-USE-012",
            f"there is no recipe {name!r}",
            fix=f"take one of {', '.join(names)}; a file of your own is named with --config",
        )
    return RECIPES / f"{name}.toml"


def gather(
    configs: Sequence[Path] = (),
    flags: Mapping[str, Any] | None = None,  # Any: TOML
    sets: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    base: Path | None = None,
) -> Settings:
    """Collect what was said.

    base: the configuration of an earlier run, on which the rest builds. configs: files that were
    named, the later winning. flags: by key. sets: `key=value`. environ: None leaves out the
    environment and the files that nobody named.
    Raises: Problem for a file that cannot be read, or a key given by its flag and by --set.
    """
    said: list[Said] = []
    sources: list[str] = []
    if base is not None:
        said += _read(base, str(base), (), is_meant=False)
        sources.append(str(base))
    if environ is not None:
        named = {config.resolve() for config in configs}
        for file, name, section in _standing_files(environ):
            if file.resolve() not in named:
                found = _read(file, name, section, is_meant=False)
                said += found
                sources += [name] if found else []
    for config in configs:
        name = f"recipe {config.stem}" if config.parent == RECIPES else str(config)
        said += _read(config, name, (), is_meant=True)
        sources.append(name)
    if environ is not None:
        variables = list(_of_environment(environ))
        said += variables
        sources += [variable.where for variable in variables]
    said += _of_command_line(flags or {}, sets)
    return Settings(tuple(said), tuple(sources))


def value_of(text: str) -> Any:  # Any: TOML
    """A TOML value, or the text itself where it is none (`--set data.source=digits`)."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def user_file(environ: Mapping[str, str]) -> Path:
    """Where the user's own file is, if there is one."""
    base = environ.get("XDG_CONFIG_HOME") or str(Path(environ.get("HOME", "~")) / ".config")
    return Path(base).expanduser() / "distbelief" / "config.toml"


def _standing_files(
    environ: Mapping[str, str],
) -> Iterable[tuple[Path, str, tuple[str, ...]]]:
    """The files that nobody needs to name: path, its name for people, our section in it."""
    user, project, pyproject = user_file(environ), Path(PROJECT_FILE), Path("pyproject.toml")
    if user.is_file():
        yield user, str(user), ()
    if project.is_file():
        yield project, PROJECT_FILE, ()
    elif pyproject.is_file():
        yield pyproject, "pyproject.toml", ("tool", "distbelief")


def _read(file: Path, name: str, section: tuple[str, ...], *, is_meant: bool) -> list[Said]:
    try:
        text = file.read_text(encoding="utf-8")
        data = tomllib.loads(text)
    except FileNotFoundError as error:
        raise Problem(
            "DB-USE-002", f"{name} is not a job: there is no such file", fix="is it spelt right?"
        ) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise Problem(
            "DB-USE-002", f"{name} is not a job: {error}", fix="see docs/configuration.md"
        ) from error
    for step in section:
        data = data.get(step, {}) if isinstance(data, dict) else {}
    lines = _lines(text)
    said = []
    for path, value in _leaves(data):
        whole = section + path
        tries = (whole[:length] for length in range(len(whole), len(section), -1))
        line = next((lines[t] for t in tries if t in lines), None)
        said.append(Said(path, value, name if line is None else f"{name}:{line}", is_meant))
    return said


def _leaves(data: Mapping[str, Any]) -> Iterable[tuple[tuple[str, ...], Any]]:  # Any: TOML
    for key, value in data.items():
        if isinstance(value, dict):  # an empty one says nothing
            for path, leaf in _leaves(value):
                yield (key, *path), leaf
        else:
            yield (key,), value


def _lines(text: str) -> dict[tuple[str, ...], int]:
    """Where keys stand, by the look of the lines: tomllib does not tell.

    A line inside a text of several lines may look like a key. The first of a name counts.
    """
    found: dict[tuple[str, ...], int] = {}
    section: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            section = _path(header[1])
            found.setdefault(section, number)
        elif key := _KEY.match(line):
            found.setdefault((*section, *_path(key[1])), number)
    return found


def _path(text: str) -> tuple[str, ...]:
    return tuple(name.strip().strip("\"'") for name in text.split("."))


def _of_environment(environ: Mapping[str, str]) -> Iterable[Said]:
    for name in sorted(environ):
        # An empty variable counts as one that is not there, as shells have it.
        if name.startswith(ENV_PREFIX) and not name.startswith(NOT_OURS) and environ[name]:
            path = tuple(name.removeprefix(ENV_PREFIX).lower().split("__"))
            yield Said(path, value_of(environ[name]), name)


def variable_of(key: str) -> str:
    """The environment variable of a key."""
    return ENV_PREFIX + key.replace(".", "__").upper()


def _of_command_line(flags: Mapping[str, Any], sets: Sequence[str]) -> Iterable[Said]:  # Any: TOML
    names = {key: "--" + flag.replace("_", "-") for flag, key in FLAGS.items()}
    for key, value in flags.items():
        yield Said(tuple(key.split(".")), value, names.get(key, "the command line"))
    for setting in sets:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise Problem(
                "DB-USE-001",
                f"--set {setting!r} has no value",
                fix="write it as --set train.lr=0.1",
            )
        if key in flags:
            raise Problem(
                "DB-USE-001", f"{key} is given twice: by its flag and by --set", fix="keep one"
            )
        yield Said(tuple(key.split(".")), value_of(text), "--set")
