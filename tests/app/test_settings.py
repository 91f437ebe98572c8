"""Settings: who said what, what wins, and where it was said."""

from pathlib import Path

import pytest

from distbelief.job import Job, compose, find_problems
from distbelief.problem import Problem
from distbelief.settings import gather, variable_of


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder as the current one; a home without settings beside it."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def user_settings(tmp_path, text):
    file = tmp_path / "home/.config/distbelief/config.toml"
    file.parent.mkdir(parents=True)
    file.write_text(text)


def environ(tmp_path, **variables):
    return {"HOME": str(tmp_path / "home"), **variables}


def test_each_layer_wins_over_the_one_below(here, tmp_path):
    """One key less in each layer, from the highest to the lowest."""
    keys = ["seed", "workers", "shards", "threads", "silence_s", "until"]
    user_settings(tmp_path, 'seed=1\nworkers=1\nshards=1\nthreads=1\nsilence_s=1\nuntil="1s"')
    (here / "distbelief.toml").write_text("seed=2\nworkers=2\nshards=2\nthreads=2\nsilence_s=2")
    (here / "a.toml").write_text("seed=3\nworkers=3\nshards=3\nthreads=3")
    (here / "b.toml").write_text("seed=4\nworkers=4\nshards=4")
    env = environ(tmp_path, DISTBELIEF_SEED="5", DISTBELIEF_WORKERS="5")
    files = [here / "a.toml", here / "b.toml"]
    settings = gather(files, {"seed": 6}, ["model.width=0.5"], env)
    job = compose(settings)
    found = [getattr(job, key) for key in keys]
    assert found == [6, 5, 4, 3, 2.0, "1s"]
    assert job.model.width == 0.5
    assert settings.sources == (
        str(tmp_path / "home/.config/distbelief/config.toml"),
        "distbelief.toml",
        *map(str, files),
        "DISTBELIEF_SEED",
        "DISTBELIEF_WORKERS",
    )


def test_a_job_made_in_python_sees_neither_environment_nor_files_nobody_named(here, monkeypatch):
    (here / "distbelief.toml").write_text("workers = 9")
    monkeypatch.setenv("DISTBELIEF_SHARDS", "9")
    assert compose(gather()) == Job()


def test_sections_of_files_are_merged_key_by_key(here):
    (here / "a.toml").write_text("[train]\nlr = 0.5\nbatch_size = 8\n[model.args]\na = 1")
    (here / "b.toml").write_text("[train]\nlr = 0.25\n[model.args]\nb = 2\n[data]")
    job = compose(gather([here / "a.toml", here / "b.toml"]))
    assert (job.train.lr, job.train.batch_size, job.model.args) == (0.25, 8, {"a": 1, "b": 2})


def test_a_section_given_as_one_value_replaces_it(here):
    (here / "a.toml").write_text("[model.args]\na = 1")
    job = compose(gather([here / "a.toml"], sets=["model.args={ b = 2 }"]))
    assert job.model.args == {"b": 2}


def test_the_projects_settings_may_lie_in_pyproject(here, tmp_path):
    (here / "pyproject.toml").write_text("[tool.other]\nx = 1\n\n[tool.distbelief.train]\nlr = 0.5")
    settings = gather(environ=environ(tmp_path))
    assert compose(settings).train.lr == 0.5
    assert [said.where for said in settings.said] == ["pyproject.toml:5"]
    (here / "distbelief.toml").write_text("workers = 3")
    settings = gather(environ=environ(tmp_path))
    assert settings.sources == ("distbelief.toml",)  # it goes before, whole


def test_a_pyproject_without_our_section_is_no_source(here, tmp_path):
    (here / "pyproject.toml").write_text("[project]\nname = 'x'")
    assert gather(environ=environ(tmp_path)) == gather()


def test_xdg_config_home_is_honoured(tmp_path):
    file = tmp_path / "xdg/distbelief/config.toml"
    file.parent.mkdir(parents=True)
    file.write_text("seed = 7")
    env = environ(tmp_path, XDG_CONFIG_HOME=str(tmp_path / "xdg"))
    assert compose(gather(environ=env)).seed == 7


def test_a_file_that_is_named_is_not_read_twice(here, tmp_path):
    (here / "distbelief.toml").write_text("seed = 7")
    settings = gather([here / "distbelief.toml"], environ=environ(tmp_path))
    assert len(settings.said) == 1
    assert settings.said[0].is_meant


@pytest.mark.parametrize(
    ("name", "text", "read"),
    [
        ("DISTBELIEF_TRAIN__N_PUSH", "2", lambda job: job.train.n_push == 2),
        ("DISTBELIEF_TRAIN__SCHEDULE__KIND", "cosine", lambda job: job.train.schedule.total == 0),
        ("DISTBELIEF_NET__INSECURE", "true", lambda job: job.net.insecure),
        ("DISTBELIEF_DATA__SOURCE", "folder:/a", lambda job: job.data.source == "folder:/a"),
        ("DISTBELIEF_MODEL__ARGS", "{ a = 1 }", lambda job: job.model.args == {"a": 1}),
        ("DISTBELIEF_SEED", "", lambda job: job == Job()),
        ("DISTBELIEF_TEST_DATA", "/data", lambda job: job == Job()),
        ("DISTBELIEF_REQUIRE_DATA", "1", lambda job: job == Job()),
        ("_DISTBELIEF_COMPLETE", "bash_source", lambda job: job == Job()),
    ],
)
def test_a_variable_is_read_like_a_setting(tmp_path, name, text, read):
    assert read(compose(gather(environ=environ(tmp_path, **{name: text}))))


def test_the_variable_of_a_key_is_the_one_that_is_read():
    assert variable_of("train.schedule.kind") == "DISTBELIEF_TRAIN__SCHEDULE__KIND"


def test_an_unknown_variable_is_named_with_the_nearest_one(tmp_path):
    with pytest.raises(Problem) as caught:
        compose(gather(environ=environ(tmp_path, DISTBELIEF_TRAIN__N_PUHS="2")))
    assert caught.value.what == "unknown key train.n_puhs"
    assert caught.value.why == "DISTBELIEF_TRAIN__N_PUHS says train.n_puhs = 2"
    assert caught.value.fix == "did you mean DISTBELIEF_TRAIN__N_PUSH?"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("workers = 0", "job.toml:1 says workers = 0"),
        ("\n[train]\n# x = 1\n\nbach_size=3", "job.toml:5 says train.bach_size = 3"),
        ("[train]\n'lr' = 'fast'", "job.toml:2 says train.lr = 'fast'"),
        ("train.schedule.knd = 1", "job.toml:1 says train.schedule.knd = 1"),
        ("[train]\nschedule = { knd = 1 }", "job.toml:2 says train.schedule.knd = 1"),
        ("[ train . schedule ]\nkind = 'x'", "job.toml:2 says train.schedule.kind = 'x'"),
        ("engine = 'slurm'", "job.toml:1 says engine = 'slurm'"),
        ("[train]\neps = 0.1", "job.toml:2 says train.eps = 0.1"),
    ],
)
def test_a_mistake_in_a_file_is_shown_with_its_line(here, text, where):
    (here / "job.toml").write_text(text)
    with pytest.raises(Problem) as caught:
        compose(gather([Path("job.toml")]))
    assert caught.value.why == where


def test_all_mistakes_are_found_one_after_the_other(here):
    (here / "job.toml").write_text(
        "workers = 0\nworker = 3\n[train]\nlr = 'fast'\nlocal_lr = -1\n[net]\nport = 70000"
    )
    found = [p.what for p in find_problems(gather([here / "job.toml"]))]
    assert sorted(text.split()[0] for text in found) == [
        "local_lr",
        "net.port",
        "train.lr",
        "unknown",
        "workers",
    ]
    assert find_problems(gather()) == []


def test_a_mistake_that_no_one_key_has_made_ends_the_search(here):
    found = find_problems(gather(sets=["train.schedule.kind=step", "workers=0"]))
    assert "a step schedule needs every" in found[0].what


def test_a_value_where_others_have_a_section_is_a_mistake_with_its_place(here):
    (here / "job.toml").write_text("train = 3")
    with pytest.raises(Problem, match="train is a value, not a section") as caught:
        compose(gather([here / "job.toml"], sets=["train.lr=1"]))
    assert caught.value.why == "--set says train.lr = 1"


@pytest.mark.parametrize("key", ["model.width=1", "data.loaders=2", "train.lr=0.1", "until=2s"])
def test_what_a_script_says_itself_is_refused_beside_it(key):
    with pytest.raises(Problem) as caught:
        compose(gather(flags={"script.path": "train.py"}, sets=[key]))
    assert caught.value.code == "DB-USE-005"
    assert caught.value.exit_code == 2
    assert key.partition("=")[0] in caught.value.what
    assert "Downpour(lr=...)" in caught.value.fix


def test_what_is_watched_of_a_script_is_said_beside_it():
    job = compose(gather(flags={"script.path": "train.py"}, sets=["train.log_grad_norm=true"]))
    assert job.train.log_grad_norm


def test_standing_files_may_say_what_a_script_says_itself(here, tmp_path):
    (here / "distbelief.toml").write_text("workers = 3\n[train]\nlr = 0.5")
    job = compose(gather(flags={"script.path": "train.py"}, environ=environ(tmp_path)))
    assert (job.workers, job.script.path, job.train) == (3, "train.py", Job().train)


def test_a_runs_own_configuration_is_what_the_rest_builds_on(here):
    job = compose(gather(flags={"script.path": "train.py"}, sets=["workers=3"]))
    (here / "config.toml").write_text(job.to_toml())
    again = compose(gather(base=here / "config.toml", sets=["workers=4"]))
    assert (again.workers, again.script.path) == (4, "train.py")


def test_a_missing_file_and_a_broken_one_are_told_apart(here):
    with pytest.raises(Problem, match="there is no such file"):
        gather([here / "gone.toml"])
    (here / "broken.toml").write_text("[train\n")
    with pytest.raises(Problem, match=r"broken\.toml is not a job: .*line 1") as caught:
        gather([here / "broken.toml"])
    assert caught.value.code == "DB-USE-002"
