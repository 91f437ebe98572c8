"""The job: defaults, file, flags and settings become one configuration, or one clear error."""

import pytest

from distbelief.job import Job, Until, load_job
from distbelief.param_server.layout import Group
from distbelief.param_server.schedule import Schedule
from distbelief.param_server.update import SGD, Adagrad
from distbelief.problem import Problem


def load(text: str = "", tmp_path=None, flags=None, settings=()) -> Job:
    config = None
    if text:
        config = tmp_path / "job.toml"
        config.write_text(text)
    return load_job(config, flags or {}, tuple(settings))


def test_nothing_but_defaults_is_a_job():
    job = load()
    assert job == Job()
    assert (job.workers, job.shards, job.engine, job.run_dir) == (2, 2, "ray", "runs")
    assert job.train.rule == SGD(momentum=0.9)
    assert job.train.groups == (Group(lr=0.005),)


def test_flags_and_settings_win_over_the_file(tmp_path):
    text = (
        'workers = 3\nshards = 3\n[train]\nlr = 0.5\nbatch_size = 8\n[model.args]\nstem = "small"'
    )
    job = load(text, tmp_path, {"train.lr": 0.25, "shards": 1}, ["train.batch_size=16"])
    assert (job.workers, job.shards, job.train.lr, job.train.batch_size) == (3, 1, 0.25, 16)
    assert job.model.args == {"stem": "small"}


@pytest.mark.parametrize(
    ("setting", "read"),
    [
        ("train.lr=1", lambda job: job.train.lr == 1.0 and type(job.train.lr) is float),
        ("data.source=fashion-mnist:/a/b", lambda job: job.data.source == "fashion-mnist:/a/b"),
        ('data.source="digits"', lambda job: job.data.source == "digits"),
        ("net.insecure=true", lambda job: job.net.insecure is True),
        ("until=20m", lambda job: job.until == "20m"),
        ("model.args.norm=batch", lambda job: job.model.args == {"norm": "batch"}),
        ("model.args.depth=3", lambda job: job.model.args == {"depth": 3}),
        ("train.schedule.kind=cosine", lambda job: job.train.schedule.kind == "cosine"),
        ("train.momentum=0.5", lambda job: job.train.rule.momentum == 0.5),
        ("run_dir=", lambda job: job.run_dir == ""),
    ],
)
def test_a_setting_is_a_toml_value_or_plain_text(setting, read):
    assert read(load(settings=[setting]))


def test_a_key_given_by_flag_and_setting_is_refused():
    with pytest.raises(Problem, match=r"train\.lr is given twice: by its flag and by --set"):
        load(flags={"train.lr": 0.1}, settings=["train.lr=0.2"])


@pytest.mark.parametrize("setting", ["train.lr", "=3", ""])
def test_a_setting_without_a_value_is_refused(setting):
    with pytest.raises(Problem, match="has no value") as caught:
        load(settings=[setting])
    assert caught.value.fix == "write it as --set train.lr=0.1"


@pytest.mark.parametrize(
    ("setting", "unknown", "fix"),
    [
        ("worker=3", "worker", "did you mean workers?"),
        ("train.learning=3", "train.learning", "train takes batch_size, lr"),
        ("train.bach_size=3", "train.bach_size", "did you mean train.batch_size?"),
        ("train.schedule.knd=poly", "train.schedule.knd", "did you mean train.schedule.kind?"),
        ("xyz=1", "xyz", "a job takes workers, shards"),
    ],
)
def test_an_unknown_key_names_the_nearest(setting, unknown, fix):
    with pytest.raises(Problem) as caught:
        load(settings=[setting])
    assert caught.value.what == f"unknown key {unknown}"
    assert fix in caught.value.fix
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("workers=two", "workers must be int, got 'two'"),
        ("workers=true", "workers must be int, got True"),
        ("workers=2.0", "workers must be int, got 2.0"),
        ("train.lr=fast", "train.lr must be float, got 'fast'"),
        ("train.lr=false", "train.lr must be float, got False"),
        ("train.momentum=x", "train.momentum must be float, got 'x'"),
        ("engine=3", "engine must be str, got 3"),
        ("net.insecure=1", "net.insecure must be bool, got 1"),
        ("train=3", "train must be a section, got 3"),
        ("model.args=3", "model.args must be a section, got 3"),
        ("run_dir=2026-01-01", "run_dir must be str, got datetime.date(2026, 1, 1)"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(setting, text):
    with pytest.raises(Problem) as caught:
        load(settings=[setting])
    assert caught.value.what == text


def test_a_value_is_not_a_section():
    with pytest.raises(Problem, match=r"workers\.x: workers is a value, not a section"):
        load(settings=["workers=3", "workers.x=4"])


REFUSED = {
    "engine=slurm": "engine 'slurm' is none of ray, local",
    "workers=0": "workers must be at least 1, got 0",
    "shards=-1": "shards must be at least 1, got -1",
    "seed=-1": "seed must be at least 0 and below 2**32, got -1",
    "seed=4294967296": "seed must be at least 0 and below 2**32, got 4294967296",
    "threads=-2": "threads must be at least 0, got -2",
    "until=soon": "until is 'soon': write a number above 0",
    "model.width=0": "model.width must be above 0, got 0.0",
    "model.width=nan": "model.width must be above 0, got nan",
    "model.width=inf": "model.width must be above 0, got inf",
    "data.image_size=-1": "data.image_size must be at least 0, got -1",
    "train.batch_size=0": "batch_size must be at least 1, got 0",
    "train.merge_every_steps=0": "merge_every_steps must be at least 1, got 0",
    "train.lr=-1": "lr must be a finite number of at least 0, got -1.0",
    "train.lr=nan": "lr must be a finite number of at least 0, got nan",
    "train.weight_decay=-1": "weight_decay must be a finite number of at least 0, got -1.0",
    "train.bias_lr=-1": "lr must be a finite number of at least 0, got -0.005",
    "train.optimizer=lion": "update rule 'lion' is none of sgd, momentum",
    "train.momentum=1": "momentum must be in [0, 1), got 1.0",
    "train.eps=0.1": "update rule momentum has no 'eps' (it takes: momentum)",
    "train.beta1=0.1": "update rule momentum has no 'beta1' (it takes: momentum)",
    "train.n_fetch=0": "n_fetch must be at least 1, got 0",
    "train.n_push=0": "n_push must be at least 1, got 0",
    "train.fetch_policy=later": "fetch_policy 'later' is none of fresh, latest",
    "train.local_lr=-1": "local_lr must be at least 0, got -1.0",
    "train.clip_norm=-1": "clip_norm must be at least 0, got -1.0",
    "train.clip_part_norm=nan": "train.clip_part_norm must be at least 0, got nan",
    "train.warm_start=-5": "train.warm_start must be at least 0, got -5",
    "train.schedule.kind=linear": "schedule kind 'linear' is none of constant",
    "train.schedule.kind=step": "a step schedule needs every >= 1",
    "train.schedule.warmup=-1": "warmup must be at least 0, got -1",
    "save.every_s=-1": "save.every_s must be at least 0, got -1.0",
    "save.every_s=nan": "save.every_s must be at least 0, got nan",
    "save.keep=1": "save.keep must be at least 2, got 1",
    "save.store=runs/store": "save.store is 'runs/store': name a URL such as s3://bucket/runs, or",
    "save.store=peers": "save.store is 'peers': name a URL",
    "save.store=simplecache::s3://bucket/runs": "is a chain of URLs",
    "save.store=sftp://me:secret@host/runs": "save.store has a password in it",
    "net.host=0.0.0.0": "net.host is '0.0.0.0': name one address",
    "net.host=::": "net.host is '::': name one address",
    "net.host=*": "net.host is '*': name one address",
    "net.keys=keys": "net.keys is keys, but connections over 127.0.0.1 are not encrypted",
}


@pytest.mark.parametrize(("setting", "text"), REFUSED.items(), ids=REFUSED)
def test_a_value_that_cannot_be_is_refused_naming_field_and_value(setting, text):
    with pytest.raises(Problem) as caught:
        load(settings=[setting])
    assert text in caught.value.what
    assert caught.value.code == "DB-USE-001"


@pytest.mark.parametrize(
    ("settings", "is_encrypted", "told"),
    [
        ([], False, ""),
        (["net.host=::1"], False, ""),
        (["net.host=127.0.0.2"], False, ""),
        (["net.host=localhost"], False, ""),
        (["net.insecure=true"], False, ""),
        (["net.encrypt=true"], True, "127.0.0.1 are encrypted"),
        (["net.host=10.0.0.5"], True, "10.0.0.5 are encrypted"),
        (["net.host=trainer.example.org"], True, "encrypted"),
        (["net.host=10.0.0.5", "net.insecure=true"], False, "10.0.0.5 are NOT ENCRYPTED"),
    ],
)
def test_beyond_the_loopback_all_is_encrypted_unless_somebody_says_not(
    settings, is_encrypted, told
):
    net = load(settings=settings).net
    assert net.is_encrypted is is_encrypted
    assert told in net.protection
    assert bool(told) == bool(net.protection)


def test_encrypted_and_insecure_at_once_is_a_mistake():
    with pytest.raises(Problem, match="both true"):
        load(settings=["net.encrypt=true", "net.insecure=true"])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["monitor.port=70000"], "monitor.port must be from 0 to 65535"),
        (["monitor.port=-1"], "monitor.port must be from 0 to 65535"),
        (["monitor.per_worker=-1"], "monitor.per_worker must be at least 0"),
        (["monitor.access=false", "monitor.host=10.0.0.7"], "whoever reaches that address"),
        (["monitor.access=false", "monitor.host=0.0.0.0"], "whoever reaches that address"),
        (["monitor.access=false", "monitor.actions=true"], "anybody could stop the run"),
        (["monitor.root_path=runs"], "no path such as /runs/7"),
        (["monitor.root_path=/runs/"], "no path such as /runs/7"),
        (["monitor.root_path=//evil.example"], "no path such as /runs/7"),
        (['monitor.log=["tensorboard","carrier pigeon"]'], "'carrier pigeon' is none of"),
        (["train.meter=1.5"], "from 0 to 1"),
        (["train.meter=-0.1"], "from 0 to 1"),
        (["train.meter=0.1", "train.n_push=2"], "n_fetch = n_push = 1"),
        (["train.meter=0.1", "train.fetch_policy=latest"], "fetch_policy 'fresh'"),
    ],
)
def test_a_monitor_that_makes_no_sense_is_refused(settings, told):
    with pytest.raises(Problem) as caught:
        load(settings=settings)
    assert told in caught.value.what


def test_a_monitor_as_it_may_be():
    monitor = load(
        settings=[
            "monitor.access=false", "monitor.host=::1", "monitor.root_path=/runs/7",
            'monitor.log=["tensorboard"]', "train.meter=0.02", "train.log_grad_norm=true",
        ]
    )  # fmt: skip
    assert monitor.monitor.is_loopback
    assert monitor.monitor.log == ("tensorboard",)
    assert (monitor.worker_config.meter, monitor.worker_config.log_grad_norm) == (0.02, True)
    plain = Job()
    assert (plain.monitor.on, plain.monitor.actions, plain.monitor.access) == (True, False, True)
    assert (plain.train.meter, plain.train.log_grad_norm) == (0.0, False)


@pytest.mark.parametrize(
    ("rule", "hyper", "taken"),
    [
        ("sgd", "momentum=0.9", "none"),
        ("adagrad", "momentum=0.9", "eps"),
        ("adam", "momentum=0.9", "beta1, beta2, eps"),
        ("nesterov", "beta1=0.9", "momentum"),
    ],
)
def test_hyper_parameters_of_other_rules_are_refused(rule, hyper, taken):
    with pytest.raises(Problem) as caught:
        load(settings=[f"train.optimizer={rule}", f"train.{hyper}"])
    assert f"update rule {rule} has no" in caught.value.what
    assert f"(it takes: {taken})" in caught.value.what


@pytest.mark.parametrize(
    ("text", "until"),
    [
        ("10-epochs", Until(epochs=10)),
        ("5000-updates", Until(updates=5000)),
        ("90s", Until(seconds=90)),
        ("20m", Until(seconds=1200)),
        ("2h", Until(seconds=7200)),
    ],
)
def test_until_says_when_a_run_ends(text, until):
    assert Until.parse(text) == until


@pytest.mark.parametrize(
    "text",
    ["", "10", "0-epochs", "0m", "-3-epochs", "1.5h", "10 epochs", "epochs", "3d", "5-epochs "],
)
def test_until_refuses_what_it_cannot_read(text):
    with pytest.raises(
        ValueError, match="write a number above 0 as 10-epochs, 5000-updates or 20m"
    ):
        Until.parse(text)


def test_a_job_survives_its_json_form():
    job = load(
        settings=[
            "until=20m",
            "train.optimizer=adagrad",
            "train.eps=1e-3",
            "train.schedule.kind=step",
            "train.schedule.every=5",
            "model.args.stem=small",
            "model.args.sizes=[1, 2]",
        ]
    )
    assert Job.from_json(job.to_json()) == job
    assert Job.from_json(Job().to_json()) == Job()


@pytest.mark.parametrize(
    ("settings", "schedule"),
    [
        (["until=10-epochs"], Schedule(kind="poly", total=14370)),
        (["until=50-updates", "train.batch_size=4"], Schedule(kind="poly", total=200)),
        (
            ["until=50-updates", "train.batch_size=4", "train.n_push=3"],
            Schedule(kind="poly", total=600),
        ),
        (["until=20m"], Schedule()),
        (
            ["until=20m", "train.schedule.kind=cosine", "train.schedule.warmup=9"],
            Schedule(warmup=9),
        ),
        (["until=20m", "train.schedule.total=7"], Schedule(kind="poly", total=7)),
        (["train.schedule.kind=constant"], Schedule()),
        (["until=2-epochs", "train.schedule.power=2"], Schedule(kind="poly", power=2, total=2874)),
    ],
)
def test_the_schedule_ends_with_the_run(settings, schedule):
    assert load(settings=settings).schedule(1437) == schedule


def test_biases_have_a_group_of_their_own_where_they_differ():
    train = load(settings=["train.bias_lr=2", "train.weight_decay=0.1", "train.bias_decay=0"]).train
    assert train.groups == (Group(lr=0.005, weight_decay=0.1), Group(lr=0.01))


@pytest.mark.parametrize(
    ("rule", "local_lr"), [("sgd", 0.3), ("momentum", 0.3), ("adagrad", 0.0), ("adamw", 0.0)]
)
def test_the_local_step_takes_the_rate_of_plain_rules_only(rule, local_lr):
    train = load(settings=["train.lr=0.3", f"train.optimizer={rule}"]).train
    assert train.downpour.local_lr == local_lr
    assert load(settings=["train.local_lr=0.7"]).train.downpour.local_lr == 0.7
    if rule == "adagrad":
        assert train.rule == Adagrad()


@pytest.mark.parametrize("content", [b"workers = ", b"\xff\xfe", b"[train\n"])
def test_a_file_that_is_no_toml_is_refused_with_its_path(tmp_path, content):
    path = tmp_path / "job.toml"
    path.write_bytes(content)
    with pytest.raises(Problem, match=r"job\.toml is not a job") as caught:
        load_job(path, {}, ())
    assert caught.value.code == "DB-USE-002"


def test_a_job_is_loaded_lazily_from_the_package():
    import distbelief

    assert distbelief.Job is Job
    assert "Job" in dir(distbelief)
    with pytest.raises(AttributeError, match="no attribute 'Jobs'"):
        _ = distbelief.Jobs


def test_workers_may_be_a_range():
    job = load(settings=["workers=2:8"])
    assert (job.min_workers, job.workers) == (2, 8)
    assert load(flags={"workers": "0:3"}).min_workers == 1
    assert Job.from_toml(job.to_toml()) == job
    assert load(settings=["workers=4"]).min_workers == 0
    with pytest.raises(Problem, match="min_workers is 8, more than workers, which is 2"):
        load(settings=["workers=8:2"])
