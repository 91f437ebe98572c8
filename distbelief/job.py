"""Job: one training run as a frozen configuration, made of settings (settings.py).

Each layer owns its own configuration; this file composes them. A job never changes after its
start; the resolved one is written into the run folder as config.toml. The text below a field is
also what the command line and docs/configuration.md say of it.
"""

import dataclasses
import difflib
import ipaddress
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

from distbelief.param_server.average import Average
from distbelief.param_server.compress import Compression
from distbelief.param_server.guard import GuardConfig
from distbelief.param_server.layout import Group
from distbelief.param_server.schedule import Schedule
from distbelief.param_server.update import SGD, Rule, make_rule, momentum_for
from distbelief.param_server.url import is_url
from distbelief.problem import Problem
from distbelief.settings import ENV_PREFIX, KeyProblem, Settings, gather, variable_of
from distbelief.workers.compute import ComputeConfig
from distbelief.workers.downpour import DownpourConfig
from distbelief.workers.view import RECIPES
from distbelief.workers.worker import WorkerConfig

ENGINES = ("ray", "local")
ACKS = ("applied", "durable", "none")
LOGGERS = ("tensorboard", "wandb", "mlflow", "trackio")
SEED_END = 2**32
"""Epochs and workers multiply the seed, and torch takes 64 bits."""
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:]+\]|[\w.-]+):\d{1,5}")
_UNTIL = re.compile(r"(\d+)(?:-(epoch|update)s?|(s|m|h))")
_ROOT_PATH = re.compile(r"(/[\w.~-]+)+")
_PASSWORD = re.compile(r"://[^/@]*:[^/@]*@")
_MEANT = re.compile(r"did you mean (.+)\?")
_SECONDS = {"s": 1, "m": 60, "h": 3600}


def is_loopback(host: str) -> bool:
    """Nobody but this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
    """`module:factory` of your own, `googlenet-small` or `googlenet`."""
    args: Mapping[str, Any] = field(default_factory=dict)  # Any: the factory's own arguments
    """Keyword arguments of the factory; num_classes, in_channels, image_size and width are added
    where it takes them."""
    width: float = 1.0
    """Multiplier on channels, for factories that take `width`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptConfig:
    """A training script of the user's, run once in each worker instead of our own loop.

    The sections model, data and train then have no meaning: the script says all that.
    """

    path: str = ""
    """A training script, run in each worker; empty for `model` and `data` and our own loop."""
    args: tuple[str, ...] = ()
    """The script's own arguments, what stands after `--`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which data."""

    source: str = "digits"
    """`digits`, `fashion-mnist[:PATH]`, `folder:PATH`, `wds:PATTERN`, or `module:function`."""
    image_size: int = 0
    """Images are resized to this square; 0 takes what suits the source (digits: 16)."""
    views: str = "middle"
    """What is taken of each image to train on: the `middle`, or what is drawn anew in each epoch by
    the recipe `paper` (GoogLeNet's), `caffe` (BVLC's) or `small` (for 32 to 64 pixels). Of image
    files alone; for tests it is always the middle."""
    seed: int | None = None
    """Of the order of the data and of the views; by default the job's `seed`, which the first
    parameters follow too."""
    loaders: int | None = None
    """Processes of each worker that decode; by default none for data in memory, else 1 or more."""
    max_bad: float = 0.01
    """Share of the samples that may be unreadable before the run ends; they are left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Update rule and the policy of pushes and fetches."""

    batch_size: int = 32
    """Samples in a batch of one worker."""
    lr: float = 0.005
    """Learning rate, applied by the shards."""
    optimizer: str = "momentum"
    """`sgd`, `momentum`, `nesterov`, `adagrad`, `adam` or `adamw`."""
    momentum: float | None = None
    """Of `momentum` and `nesterov`. A hyper-parameter that the rule does not have is an error."""
    beta1: float | None = None
    """Of `adam` and `adamw`."""
    beta2: float | None = None
    """Of `adam` and `adamw`."""
    eps: float | None = None
    """Of `adagrad`, `adam` and `adamw`."""
    weight_decay: float = 0.0
    """L2; decoupled for `adamw`."""
    bias_lr: float = 1.0
    """Factor on the rate of 1-D tensors (biases and norms); Caffe's GoogLeNet has 2."""
    bias_decay: float = 1.0
    """Factor on the decay of 1-D tensors; Caffe's GoogLeNet has 0."""
    schedule: Schedule = field(default_factory=lambda: Schedule(kind="poly"))
    """Factor on the rate by samples applied; by default it falls in a line to 0 at the end."""
    average: Average = field(default_factory=Average)
    """Polyak averaging on the shards: what the run comes to is then an average of the values."""
    n_fetch: int = 1
    """Steps from one fetch to the next."""
    n_push: int = 1
    """Steps from one push to the next; a push carries their sum."""
    fetch_policy: str = "fresh"
    """`fresh` waits for the answer to its own push; `latest` never waits."""
    overlap: bool | None = None
    """Parts of a gradient leave while backward is still running. By default where that is allowed
    (`fresh`, n_fetch = n_push = 1, no clip_norm) and each tensor gets its gradient in one piece."""
    local_lr: float | None = None
    """The paper's alpha, the local step between two fetches; by default `lr` for `sgd`,
    `momentum` and `nesterov`, and 0 for the adaptive rules, whose lr is no rate of a plain step."""
    clip_norm: float = 0.0
    """Norm of the whole gradient, clipped in the worker; 0 does not."""
    clip_part_norm: float = 0.0
    """Norm of a part's gradient, clipped by its shard; 0 does not."""
    warm_start: int = 0
    """Samples that one worker trains on alone first."""
    merge_every_steps: int = 20
    """Steps between two merges of buffers such as BatchNorm's."""
    precision: str = "float32"
    """In which layers compute: `float32`, `bfloat16` or `float16` (torch.autocast). Parameters on
    the shards, and gradients, are float32 whatever it is."""
    channels_last: bool = False
    """Images have their channels innermost, which GPUs with tensor cores like."""
    compile: bool = False
    """Models go through torch.compile: some minutes at the start of each worker."""
    log_grad_norm: bool = False
    """Workers tell the monitor the norm of each step's gradient, clipped as it is pushed. It is
    read once more for that: 0.4 ms a step for a million values, on one core."""
    meter: float = 0.0
    """Share of the steps whose gradient is computed a second time, on the parameters that its push
    has brought, to see what asynchrony does to it; each costs a step. Not for scripts."""

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
            overlap=self.overlap,
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
    """Address to listen on. On another than the loopback connections are encrypted, and nobody is
    let in but the run's own processes."""
    encrypt: bool = False
    """Do that on the loopback too."""
    insecure: bool = False
    """Do not do it anywhere: whoever sees the network can read and change what is sent."""
    keys: str = ""
    """A folder of `distbelief keys new`: keys that lie there are used, the others made for the
    run."""
    port: int = 0
    """The controller listens on this port and shard i on port + 1 + i; 0 takes free ones."""
    announce: tuple[str, ...] = ()
    """HOST:PORT of each shard where workers reach it, if not where it listens: behind NAT, or a
    forwarder. Needs `port`."""
    shared_memory: bool = True
    """Gradients and parameters stay in memory that workers and shards of one host share."""
    compress_push: str = "float32"
    """Form of gradients on the network: `float32` (not compressed), `bfloat16`, `int8`, `topk`."""
    compress_fetch: str = "float32"
    """Form of parameters on the network: `float32`, `bfloat16` or `int8`."""
    compress_top: float = 0.01
    """Share of a gradient that `topk` sends."""
    budget_mb: int = 16
    """MiB of gradients and parameters under way to and from a shard, over all workers together."""

    @property
    def is_loopback(self) -> bool:
        """Nobody but this machine can connect."""
        return is_loopback(self.host)

    @property
    def is_everywhere(self) -> bool:
        """Not one address, but all of the machine's."""
        try:
            return ipaddress.ip_address(self.host).is_unspecified
        except ValueError:
            return self.host in ("", "*")

    @property
    def is_encrypted(self) -> bool:
        return self.encrypt or not (self.is_loopback or self.insecure)

    @property
    def protection(self) -> str:
        """What a person is told of it; empty where nothing leaves the machine, as usual."""
        if self.is_encrypted:
            return f"connections at {self.host} are encrypted, by keys of this run"
        if self.is_loopback:
            return ""
        return f"connections at {self.host} are NOT ENCRYPTED (net.insecure)"

    @property
    def compression(self) -> Compression:
        """Raises: ValueError for what makes no sense."""
        return Compression(
            push=self.compress_push, fetch=self.compress_fetch, top=self.compress_top
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceConfig:
    """Where the processes of a run go in a Ray cluster of several hosts."""

    shards: str = "ps"
    """Shards go to hosts that have a custom resource, or a label, of this name; to any where no
    host has."""
    workers: str = "worker"
    """The same for workers."""
    shard_cpus: float = 1.0
    """CPUs that a shard holds, as Ray counts them."""
    worker_cpus: float = 1.0
    """CPUs that a worker holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveConfig:
    """Snapshots of the shards."""

    every_s: float = 30.0
    """Seconds between snapshots of a shard; 0 saves at the end only."""
    keep: int = 2
    """Snapshots kept, at least 2: the older one is used where the newest is damaged."""
    ack: str = "applied"
    """When a push counts: `applied` by the shards (workers keep it until it is saved, and send it
    again to a shard that was restarted), `durable` (saved), or `none`: applied, and what a shard
    has not saved is lost with it."""
    backup_mb: int = 512
    """MiB of pushed gradients that a worker keeps until they are saved; 2 to 64 pushes."""
    store: str = ""
    """Where snapshots are kept too, for when a host is lost: a URL that fsspec knows, such as
    `s3://bucket/runs`, or the absolute path of a folder that all hosts have mounted. Pushes are
    durable when they are there. Empty: snapshots are in the run folder alone."""
    history: bool = False
    """Keep what shards have acknowledged for good, and have workers write down what they push and
    what was answered: for the history checker."""

    @property
    def backup_bytes(self) -> int:
        return 0 if self.ack == "none" else self.backup_mb * 2**20

    def check(self) -> None:
        """Raises: ValueError for what makes no sense."""
        if self.ack not in ACKS:
            raise ValueError(f"save.ack {self.ack!r} is none of {', '.join(ACKS)}")
        if self.store and not (is_url(self.store) or Path(self.store).is_absolute()):
            raise ValueError(
                f"save.store is {self.store!r}: name a URL such as s3://bucket/runs, or an "
                "absolute path that is the same on all hosts"
            )
        if "::" in self.store:
            raise ValueError(f"save.store {self.store!r} is a chain of URLs: name the last of them")
        if _PASSWORD.search(self.store):
            raise ValueError(
                "save.store has a password in it, which would be written into the run folder: give "
                "it in the environment, as the store's own tools read it"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """The evaluator: a process of its own that evaluates while workers train."""

    every_s: float = 0.0
    """Seconds from one evaluation to the next, on the test split; 0 evaluates at the end only. It
    takes a core for as long as it lasts, after those who train. Not for scripts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorConfig:
    """The monitor: a process of its own that watches the run and serves its dashboard."""

    on: bool = True
    """Watch the run. What it costs to be watched is in docs/benchmarks.md."""
    host: str = "127.0.0.1"
    """Address on which browsers are served."""
    port: int = 0
    """Port of that; 0 takes 8787, or any free one where that is taken."""
    actions: bool = False
    """The dashboard may drain workers and stop the run."""
    access: bool = True
    """Who looks must have the secret of the link. Only on the loopback may it be false."""
    root_path: str = ""
    """Path under which a proxy serves the dashboard, such as `/runs/7`."""
    hosts: tuple[str, ...] = ()
    """Names by which browsers may ask for it, besides `host` and the loopback's: a proxy's."""
    log: tuple[str, ...] = ()
    """Where values are logged too: `tensorboard`, `wandb`, `mlflow`, `trackio`."""
    per_worker: int = 256
    """Up to so many workers `/metrics` has values of each; above, of the 20 worst."""

    @property
    def is_loopback(self) -> bool:
        """Nobody but this machine can ask."""
        return is_loopback(self.host)

    def check(self) -> None:
        """Raises: ValueError for what makes no sense."""
        if not 0 <= self.port <= 65535:
            raise ValueError(f"monitor.port must be from 0 to 65535, got {self.port}")
        if self.per_worker < 0:
            raise ValueError(f"monitor.per_worker must be at least 0, got {self.per_worker}")
        if self.actions and not self.access:
            raise ValueError("monitor.actions needs monitor.access: anybody could stop the run")
        if not (self.access or self.is_loopback):
            raise ValueError(
                f"monitor.access is false and monitor.host is {self.host}: whoever reaches that "
                "address could look. Leave monitor.access as it is"
            )
        if self.root_path and not _ROOT_PATH.fullmatch(self.root_path):
            raise ValueError(f"monitor.root_path {self.root_path!r} is no path such as /runs/7")
        for name in self.log:
            if name not in LOGGERS:
                raise ValueError(f"monitor.log: {name!r} is none of {', '.join(LOGGERS)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training run. Every field has a default: `Job()` trains GoogLeNet on digits."""

    workers: int = 2
    """Model replicas that compute gradients. `"2:8"` is `workers = 8` with `min_workers = 2`."""
    shards: int = 2
    """Processes that hold the parameters; at most as many as the model has parts."""
    min_workers: int = 0
    """The run goes on with so many, and `distbelief scale` changes their number while it does; 0:
    the number is fixed."""
    engine: str = "ray"
    """`ray`, or `local` (plain subprocesses of this machine)."""
    address: str = "local"
    """Ray's: `local` starts a cluster of the run's own on this machine; `auto` and `host:port` join
    the one that this machine is a part of, and place the run on all of its hosts."""
    working_dir: str = "."
    """The folder with the user's code: it goes to every host of a cluster, without what its
    .gitignore names and up to Ray's limit of 512 MiB. By default that of the command."""
    until: str = "12-epochs"
    """`10-epochs`, `5000-updates` (of the part furthest behind), `90s`, `20m`, `2h`."""
    seed: int = 0
    """Of the first parameters and of the data's order."""
    run_dir: str = "runs"
    """Where run folders are made."""
    threads: int = 0
    """Threads of torch in each worker; 0 divides the cores by the workers."""
    device: str = "cpu"
    """Where a worker computes; `cuda` spreads the workers of a machine over its GPUs."""
    gpus: float = 0.0
    """GPUs that Ray is asked for each worker; 0.25 puts four workers on one."""
    restarts: int = 5
    """A worker, a shard or the controller that is lost is started again; one that is lost so often
    in a row without having done anything is given up. 0 starts none again."""
    warm_workers: bool = False
    """Engine `local` forks workers, as it does shards, from a process that has imported torch: one
    that was lost is back at once. Not for scripts that want to be a process from its beginning."""
    silence_s: float = 300.0
    """A worker that has said nothing for so long is ended; one batch must not take longer."""
    script: ScriptConfig = field(default_factory=ScriptConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    net: NetConfig = field(default_factory=NetConfig)
    place: PlaceConfig = field(default_factory=PlaceConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine {self.engine!r} is none of {', '.join(ENGINES)}")
        if self.data.views not in RECIPES:
            raise ValueError(f"data.views {self.data.views!r} is none of {', '.join(RECIPES)}")
        for name in ("workers", "shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for key, number, least in (
            ("min_workers", self.min_workers, 0),
            ("gpus", self.gpus, 0),
            ("threads", self.threads, 0),
            ("silence_s", self.silence_s, 1),
            ("restarts", self.restarts, 0),
            ("train.warm_start", self.train.warm_start, 0),
            ("train.clip_part_norm", self.train.clip_part_norm, 0),
            ("net.budget_mb", self.net.budget_mb, 1),
            ("data.image_size", self.data.image_size, 0),
            ("data.loaders", self.data.loaders or 0, 0),
            ("data.max_bad", self.data.max_bad, 0),
            ("place.shard_cpus", self.place.shard_cpus, 0),
            ("place.worker_cpus", self.place.worker_cpus, 0),
            ("save.every_s", self.save.every_s, 0),
            ("evaluate.every_s", self.evaluate.every_s, 0),
            ("save.keep", self.save.keep, 2),
            ("save.backup_mb", self.save.backup_mb, 1),
        ):
            if not least <= number < math.inf:
                raise ValueError(f"{key} must be at least {least}, got {number}")
        if self.min_workers > self.workers:
            raise ValueError(
                f"min_workers is {self.min_workers}, more than workers, which is {self.workers}: "
                f'say both, as in workers = "1:{self.workers}"'
            )
        for name, seed in (("seed", self.seed), ("data.seed", self.data_seed)):
            if not 0 <= seed < SEED_END:
                raise ValueError(f"{name} must be at least 0 and below 2**32, got {seed}")
        if not 0 < self.model.width < math.inf:
            raise ValueError(f"model.width must be above 0, got {self.model.width}")
        if not 0 <= self.net.port <= 65535 - self.shards:
            raise ValueError(
                f"net.port is {self.net.port}: the controller takes that port and {self.shards} "
                "shards the next ones, so it must be from 0 (any free ones) to "
                f"{65535 - self.shards}"
            )
        if self.net.announce and len(self.net.announce) != self.shards:
            raise ValueError(
                f"net.announce has {len(self.net.announce)} addresses, there are {self.shards} "
                "shards: name one for each"
            )
        if self.net.announce and not self.net.port:
            raise ValueError(
                "net.announce needs net.port: whoever forwards to the shards must know where they "
                "listen"
            )
        for address in self.net.announce:
            if not _ADDRESS.fullmatch(address):
                raise ValueError(f"net.announce: {address!r} is not HOST:PORT")
        if self.net.is_everywhere:
            raise ValueError(
                f"net.host is {self.net.host!r}: name one address of this machine, at which the "
                "run's other processes reach it"
            )
        if self.net.encrypt and self.net.insecure:
            raise ValueError("net.encrypt and net.insecure are both true: leave one of them out")
        if self.net.keys and not self.net.is_encrypted:
            raise ValueError(
                f"net.keys is {self.net.keys}, but connections over {self.net.host} are not "
                "encrypted: add --set net.encrypt=true"
            )
        self.save.check()
        self.monitor.check()
        # Checked here, so that a mistake is found before any process is started.
        Until.parse(self.until)
        _ = self.train.groups, self.worker_config
        if not 0 <= self.train.meter <= 1:
            raise ValueError(f"train.meter is a share, from 0 to 1, got {self.train.meter}")
        downpour = self.train.downpour
        is_plain = downpour.n_fetch == downpour.n_push == 1 and downpour.fetch_policy == "fresh"
        if self.train.meter and not is_plain:
            raise ValueError(
                "train.meter needs n_fetch = n_push = 1 and fetch_policy 'fresh': it looks at what "
                "the answer to a push has brought"
            )
        if self.train.average.tail and Until.parse(self.until).seconds is not None:
            raise ValueError(
                "train.average.tail is a share of the run's length, which a run that ends by the "
                "clock does not have: say train.average.start, in samples"
            )
        self.net.compression.check(self.train.rule, self.train.clip_part_norm)

    def warnings(self) -> list[str]:
        """What is allowed, and likely not meant."""
        rule, most = self.train.rule, momentum_for(self.workers)
        momentum = rule.momentum if isinstance(rule, SGD) else 0.0
        if self.script.path or momentum <= most:
            return []
        return [
            f"momentum {momentum:g} is high for {self.workers} workers: that pushes of others come "
            f"between acts like momentum itself, of 1 - 1/{self.workers} in theory. Should it not "
            f"learn: --set train.momentum={most:g} (docs/architecture.md)"
        ]

    @property
    def data_seed(self) -> int:
        return self.seed if self.data.seed is None else self.data.seed

    @property
    def worker_config(self) -> WorkerConfig:
        return WorkerConfig(
            batch_size=self.train.batch_size,
            seed=self.data_seed,
            merge_every_steps=self.train.merge_every_steps,
            compute=ComputeConfig(
                device=self.device,
                precision=self.train.precision,
                channels_last=self.train.channels_last,
                compile=self.train.compile,
            ),
            downpour=self.train.downpour,
            compression=self.net.compression,
            backup_bytes=self.save.backup_bytes,
            waits=self.save.ack == "durable",
            meter=self.train.meter,
            log_grad_norm=self.train.log_grad_norm,
        )

    def schedule(self, num_samples: int) -> Schedule:
        """The schedule with its total; num_samples are in the training split.

        Where total is 0 it is the length of the run in samples. A run that ends by the clock
        has no such length, so its rate stays constant.
        """
        schedule, total = self.train.schedule.of(num_samples), self.length(num_samples)
        if schedule.total or schedule.kind not in ("poly", "cosine"):
            return schedule
        if total is not None:
            return replace(schedule, total=total)
        return Schedule(warmup=schedule.warmup)

    def average(self, num_samples: int) -> Average:
        """The average with its start, where that was said as a share of the run."""
        average, total = self.train.average, self.length(num_samples)
        if not average.tail or total is None:
            return average
        return replace(average, start=int(total * (1 - average.tail)), tail=0.0)

    def length(self, num_samples: int) -> int | None:
        """Of the run, in samples; None where it ends by the clock."""
        until = Until.parse(self.until)
        if until.epochs is not None:
            return until.epochs * num_samples
        if until.updates is not None:
            return until.updates * self.train.batch_size * self.train.n_push
        return None

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
        job = _build(cls(), _with_range(data), "")
        assert isinstance(job, Job)
        return job


_RANGE = re.compile(r"(\d+):(\d+)")


def _with_range(data: Mapping[str, Any]) -> Mapping[str, Any]:  # Any: TOML
    """With `workers = "2:8"` taken apart; it counts, whatever min_workers is said to be."""
    said = data.get("workers") if isinstance(data, Mapping) else None
    found = _RANGE.fullmatch(said) if isinstance(said, str) else None
    if found is None:
        return data
    return {**data, "min_workers": max(1, int(found[1])), "workers": int(found[2])}


def load_job(
    config: Path | None,
    flags: Mapping[str, Any],
    settings: tuple[str, ...],  # Any: TOML
) -> Job:
    """Compose a job: defaults, then the TOML file, then flags and `--set key=value`.

    flags: by dotted key, as settings. Raises: Problem.
    """
    return compose(gather([] if config is None else [config], flags, settings))


def compose(settings: Settings) -> Job:
    """The job that settings come to.

    Raises: Problem naming the key and where it was said.
    """
    job, problem = _try(settings)
    if job is None:
        assert problem is not None
        raise problem
    return job


def find_problems(settings: Settings) -> list[Problem]:
    """All that is wrong with settings: each mistake is put aside to look for the next."""
    found: list[Problem] = []
    while True:
        problem = _try(settings)[1]
        if problem is None:
            return found
        found.append(problem)
        rest = settings.without(problem.key) if problem.key else settings
        if rest == settings:  # nobody can say which key it is
            return found
        settings = rest


def _try(settings: Settings) -> tuple[Job | None, KeyProblem | None]:
    try:
        settings = settings.for_script()
        return Job.from_dict(settings.data()), None
    except KeyProblem as problem:
        return None, _blame(problem, settings)


def _blame(problem: KeyProblem, settings: Settings) -> KeyProblem:
    """Say where the wrong value was said, if one place can be named."""
    if problem.why:
        return problem
    said = settings.about(problem.key) if problem.key else []
    if not said:
        # A message of a value's own class has no whole key, but the name in front, or the name or
        # the value in quotes.
        words = [*re.findall(r"'(\w+)'", problem.what), problem.what.split()[0].split(".")[-1]]
        for word in words:
            said = [s for s in settings.said if word in (s.path[-1], s.value)]
            if len({s.path for s in said}) == 1:
                break
            said = []
    if said:
        newest = said[-1]
        problem.key = newest.key
        problem.why = f"{newest.where} says {newest.key} = {newest.value!r}"
        if newest.where.startswith(ENV_PREFIX) and (near := _MEANT.fullmatch(problem.fix)):
            problem.fix = f"did you mean {variable_of(near[1])}?"
    return problem


def _without_none(data: Mapping[str, Any]) -> dict[str, Any]:  # Any: TOML
    """TOML has no null: a key that is not there has its default, which is None."""
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in data.items()
        if value is not None
    }


def _build(base: Any, data: Mapping[str, Any], prefix: str) -> Any:  # Any: one of our configs
    """A configuration as `base`, changed by what data says."""
    if not isinstance(data, Mapping):
        raise KeyProblem(prefix[:-1], f"{prefix[:-1]} must be a section, got {data!r}")
    hints = typing.get_type_hints(type(base))
    names = [f.name for f in dataclasses.fields(base)]
    values: dict[str, Any] = {}  # Any: as above
    for key, value in data.items():
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            raise KeyProblem(
                prefix + key,
                f"unknown key {prefix}{key}",
                f"did you mean {prefix}{near[0]}?"
                if near
                else f"{prefix[:-1] or 'a job'} takes {', '.join(names)}",
            )
        values[key] = _fit(hints[key], value, prefix + key, getattr(base, key))
    try:
        return replace(base, **values)
    except ValueError as error:
        raise KeyProblem("", str(error), "see docs/configuration.md") from error


def _fit(hint: Any, value: Any, key: str, default: Any) -> Any:  # Any: annotations, TOML values
    """Hold a value against the annotation of its field."""
    if dataclasses.is_dataclass(hint):
        return _build(default, value, key + ".")
    if typing.get_origin(hint) is types.UnionType:
        if value is None:
            return None
        hint = next(arg for arg in typing.get_args(hint) if arg is not types.NoneType)
    wanted = typing.get_origin(hint) or hint
    if wanted is tuple:  # of texts: the only one there is
        if not isinstance(value, list | tuple) or not all(type(v) is str for v in value):
            raise KeyProblem(key, f"{key} must be a list of texts, got {value!r}")
        return tuple(value)
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted and not (wanted is Mapping and isinstance(value, dict)):
        wish = "a section" if wanted is Mapping else wanted.__name__
        raise KeyProblem(key, f"{key} must be {wish}, got {value!r}")
    return value
