"""Job: one training run as a frozen configuration, from a TOML file, flags and `--set`.

Each layer owns its own configuration; this file composes them. A job never changes after its
start; the resolved one is written into the run folder as job.json.
"""

import dataclasses
import difflib
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tomli_w

from distbelief.param_server.layout import Group
from distbelief.param_server.schedule import Schedule
from distbelief.param_server.update import Rule, make_rule
from distbelief.problem import Problem
from distbelief.workers.downpour import DownpourConfig
from distbelief.workers.worker import WorkerConfig

ENGINES = ("ray", "local")
SEED_END = 2**32
"""Epochs and workers multiply the seed, and torch takes 64 bits."""
_UNTIL = re.compile(r"(\d+)(?:-(epoch|update)s?|(s|m|h))")
_SECONDS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True, slots=True, kw_only=True)
class Until:
    """When a run ends: exactly one field is set."""

    epochs: int | None = None
    updates: int | None = None
    seconds: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Until":
        """Read `10-epochs`, `5000-updates`, `90s`, `20m` or `2h`."""
        match = _UNTIL.fullmatch(text)
        if match is None or not int(match[1]):
            raise ValueError(
                f"until is {text!r}: write a number above 0 as 10-epochs, 5000-updates or 20m"
            )
        number, unit, time_unit = int(match[1]), match[2], match[3]
        if time_unit:
            return cls(seconds=number * _SECONDS[time_unit])
        return cls(epochs=number) if unit == "epoch" else cls(updates=number)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which model, and how it is made."""

    factory: str = "googlenet-small"
    """module:function that returns an nn.Module, or one of factory.KNOWN."""
    args: Mapping[str, Any] = field(default_factory=dict)  # Any: the factory's own arguments
    """Keyword arguments of the factory. num_classes, in_channels, image_size and width are added
    where it takes them and they are not given."""
    width: float = 1.0
    """Multiplier on the number of channels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptConfig:
    """A training script of the user's, run once in each worker instead of our own loop.

    The sections model, data and train then have no meaning: the script says all that.
    """

    path: str = ""
    """Empty: no script, the worker's own loop trains `model` on `data`."""
    args: tuple[str, ...] = ()
    """The script's own arguments, its sys.argv[1:]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which data."""

    source: str = "digits"
    """digits, fashion-mnist[:PATH], folder:PATH, wds:PATTERN, or module:function."""
    image_size: int = 0
    """Images are resized to this square; 0 takes what suits the source (digits: 16)."""
    loaders: int | None = None
    """Processes of each worker that decode. By default none for data in memory, else 1 or more."""
    max_bad: float = 0.01
    """Share of the samples that may be unreadable before the run ends; they are left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Update rule and the policy of pushes and fetches."""

    batch_size: int = 32
    """Samples in a batch of one worker."""
    lr: float = 0.005
    optimizer: str = "momentum"
    """sgd, momentum, nesterov, adagrad, adam or adamw; applied by the shards."""
    momentum: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None
    weight_decay: float = 0.0
    bias_lr: float = 1.0
    """Factor on the rate of 1-D tensors (biases and norms). Caffe's GoogLeNet has 2."""
    bias_decay: float = 1.0
    """Factor on the decay of 1-D tensors. Caffe's GoogLeNet has 0."""
    schedule: Schedule = field(default_factory=lambda: Schedule(kind="poly"))
    """Factor on the rate by samples applied; by default it falls in a line to 0 at the end."""
    n_fetch: int = 1
    n_push: int = 1
    fetch_policy: str = "fresh"
    local_lr: float | None = None
    """The paper's alpha. By default lr for sgd, momentum and nesterov, and 0 for the adaptive
    rules, whose lr is no rate of a plain step."""
    clip_norm: float = 0.0
    clip_part_norm: float = 0.0
    warm_start: int = 0
    """Samples that one worker trains on alone before the others begin."""
    merge_every_steps: int = 20

    @property
    def rule(self) -> Rule:
        """The update rule. Raises: ValueError for a name or parameter that does not exist."""
        given = {name: getattr(self, name) for name in ("momentum", "beta1", "beta2", "eps")}
        return make_rule(self.optimizer, **{k: v for k, v in given.items() if v is not None})

    @property
    def downpour(self) -> DownpourConfig:
        local_lr = self.local_lr
        if local_lr is None:
            local_lr = self.lr if self.optimizer in ("sgd", "momentum", "nesterov") else 0.0
        return DownpourConfig(
            n_fetch=self.n_fetch,
            n_push=self.n_push,
            fetch_policy=self.fetch_policy,
            local_lr=local_lr,
            clip_norm=self.clip_norm,
        )

    @property
    def groups(self) -> tuple[Group, ...]:
        """Group 0: tensors of 2 or more dimensions; group 1: the others, where they differ."""
        first = Group(lr=self.lr, weight_decay=self.weight_decay)
        if self.bias_lr == 1 and self.bias_decay == 1:
            return (first,)
        second = Group(lr=self.lr * self.bias_lr, weight_decay=self.weight_decay * self.bias_decay)
        return (first, second)


@dataclass(frozen=True, slots=True, kw_only=True)
class NetConfig:
    """Where the processes of a job listen."""

    host: str = "127.0.0.1"
    """Address to bind to. Anything but loopback is unencrypted today and needs `insecure`."""
    insecure: bool = False
    """Listen beyond loopback without encryption, inside a network that is all yours."""
    port: int = 0
    """The controller listens on this port and shard i on port + 1 + i; 0 takes free ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveConfig:
    """Snapshots of the shards."""

    every_s: float = 30.0
    """Seconds between two snapshots; 0 saves only at the end."""
    keep: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training run. Every field has a default: `Job()` trains GoogLeNet on digits."""

    workers: int = 2
    shards: int = 2
    engine: str = "ray"
    """ray, or local (plain subprocesses of this machine)."""
    address: str = "local"
    """Ray's: local starts a cluster of its own on this machine; auto, or host:port."""
    until: str = "12-epochs"
    """10-epochs, 5000-updates (of the part furthest behind), or 20m."""
    seed: int = 0
    run_dir: str = "runs"
    """Folder in which each run makes a folder of its own."""
    dashboard: bool = True
    """Accepted; has no effect yet."""
    threads: int = 0
    """Threads of torch in each worker; 0 divides the machine's cores by the workers."""
    device: str = "cpu"
    silence_s: float = 300.0
    """A worker that has said nothing for so long is ended; one batch must not take longer."""
    script: ScriptConfig = field(default_factory=ScriptConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    net: NetConfig = field(default_factory=NetConfig)
    save: SaveConfig = field(default_factory=SaveConfig)

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine {self.engine!r} is none of {', '.join(ENGINES)}")
        for name in ("workers", "shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for key, number, least in (
            ("threads", self.threads, 0),
            ("silence_s", self.silence_s, 1),
            ("train.warm_start", self.train.warm_start, 0),
            ("train.clip_part_norm", self.train.clip_part_norm, 0),
            ("data.image_size", self.data.image_size, 0),
            ("data.loaders", self.data.loaders or 0, 0),
            ("data.max_bad", self.data.max_bad, 0),
            ("save.every_s", self.save.every_s, 0),
            ("save.keep", self.save.keep, 2),
        ):
            if not least <= number < math.inf:
                raise ValueError(f"{key} must be at least {least}, got {number}")
        if not 0 <= self.seed < SEED_END:
            raise ValueError(f"seed must be at least 0 and below 2**32, got {self.seed}")
        if not 0 < self.model.width < math.inf:
            raise ValueError(f"model.width must be above 0, got {self.model.width}")
        if not 0 <= self.net.port <= 65535 - self.shards:
            raise ValueError(
                f"net.port is {self.net.port}: the controller takes that port and {self.shards} "
                "shards the next ones, so it must be from 0 (any free ones) to "
                f"{65535 - self.shards}"
            )
        if self.net.host not in ("127.0.0.1", "::1", "localhost") and not self.net.insecure:
            raise ValueError(
                f"net.host is {self.net.host}: beyond loopback the connections of this version "
                "are not encrypted. If the network is all yours, add --set net.insecure=true"
            )
        # Checked here, so that a mistake is found before any process is started.
        Until.parse(self.until)
        _ = self.train.rule, self.train.groups, self.worker_config

    @property
    def worker_config(self) -> WorkerConfig:
        return WorkerConfig(
            batch_size=self.train.batch_size,
            seed=self.seed,
            merge_every_steps=self.train.merge_every_steps,
            device=self.device,
            downpour=self.train.downpour,
        )

    def schedule(self, num_samples: int) -> Schedule:
        """The schedule with its total; num_samples are in the training split.

        Where total is 0 it is the length of the run in samples. A run that ends by the clock
        has no such length, so its rate stays constant.
        """
        schedule, until = self.train.schedule, Until.parse(self.until)
        if schedule.total or schedule.kind not in ("poly", "cosine"):
            return schedule
        if until.epochs is not None:
            return replace(schedule, total=until.epochs * num_samples)
        if until.updates is not None:
            samples = self.train.batch_size * self.train.n_push
            return replace(schedule, total=until.updates * samples)
        return Schedule(warmup=schedule.warmup)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Job":
        return cls.from_dict(json.loads(text))

    def to_toml(self) -> str:
        """The resolved job as a person would write it; `from_toml` reads it back."""
        return tomli_w.dumps(_without_none(dataclasses.asdict(self)))

    @classmethod
    def from_toml(cls, text: str) -> "Job":
        """Raises: Problem."""
        try:
            return cls.from_dict(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise Problem("DB-USE-002", f"not a job: {error}") from error

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Job":  # Any: TOML and JSON
        """Raises: Problem naming the key, for an unknown one the nearest known one."""
        job = _build(cls, data, "")
        assert isinstance(job, Job)
        return job


def load_job(
    config: Path | None,
    flags: Mapping[str, Any],
    settings: tuple[str, ...],  # Any: TOML
) -> Job:
    """Compose a job: defaults, then the TOML file, then flags and `--set key=value`.

    flags: by dotted key, as settings. Raises: Problem.
    """
    data: dict[str, Any] = {}  # Any: TOML
    if config is not None:
        try:
            data = tomllib.loads(config.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise Problem(
                "DB-USE-002", f"{config} is not a job: {error}", fix="see docs/configuration.md"
            ) from error
    overrides = dict(flags)
    for setting in settings:
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
        overrides[key] = _value(text)
    for key, value in overrides.items():
        _put(data, key, value)
    return Job.from_dict(data)


def _without_none(data: Mapping[str, Any]) -> dict[str, Any]:  # Any: TOML
    """TOML has no null: a key that is not there has its default, which is None."""
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in data.items()
        if value is not None
    }


def _value(text: str) -> Any:  # Any: TOML
    """A TOML value, or the text itself where it is none (`--set data.source=digits`)."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _put(data: dict[str, Any], key: str, value: Any) -> None:  # Any: TOML
    *path, last = key.split(".")
    for name in path:
        data = data.setdefault(name, {})
        if not isinstance(data, dict):
            raise Problem("DB-USE-001", f"{key}: {name} is a value, not a section")
    data[last] = value


def _build(cls: type, data: Mapping[str, Any], prefix: str) -> Any:  # Any: one of our configs
    if not isinstance(data, Mapping):
        raise Problem("DB-USE-001", f"{prefix[:-1]} must be a section, got {data!r}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    values: dict[str, Any] = {}  # Any: as above
    for key, value in data.items():
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            raise Problem(
                "DB-USE-001",
                f"unknown key {prefix}{key}",
                fix=f"did you mean {prefix}{near[0]}?"
                if near
                else f"{prefix[:-1] or 'a job'} takes {', '.join(names)}",
            )
        values[key] = _fit(hints[key], value, prefix + key)
    try:
        return cls(**values)
    except ValueError as error:
        raise Problem("DB-USE-001", str(error), fix="see docs/configuration.md") from error


def _fit(hint: Any, value: Any, key: str) -> Any:  # Any: annotations and TOML values
    """Hold a value against the annotation of its field."""
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return _build(hint, value, key + ".")
    if typing.get_origin(hint) is types.UnionType:
        if value is None:
            return None
        hint = next(arg for arg in typing.get_args(hint) if arg is not types.NoneType)
    wanted = typing.get_origin(hint) or hint
    if wanted is tuple:  # of texts: the only one there is
        if not isinstance(value, list | tuple) or not all(type(v) is str for v in value):
            raise Problem("DB-USE-001", f"{key} must be a list of texts, got {value!r}")
        return tuple(value)
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted and not (wanted is Mapping and isinstance(value, dict)):
        raise Problem(
            "DB-USE-001",
            f"{key} must be {'a section' if wanted is Mapping else wanted.__name__}, got {value!r}",
        )
    return value
