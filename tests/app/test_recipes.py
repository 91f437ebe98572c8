import pytest
from click.testing import CliRunner

from distbelief.cli import cli
from distbelief.factory import make_contract, make_model, open_data, with_views
from distbelief.job import compose, load_job
from distbelief.param_server.update import SGD, momentum_for
from distbelief.problem import Problem
from distbelief.settings import RECIPES, gather, recipe
from distbelief.workers.pixels import Pictures

IMAGENET = 1_281_167
NAMES = sorted(file.stem for file in RECIPES.glob("*.toml"))


def job_of(name, **flags):
    return compose(gather([recipe(name)], flags))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_a_job(name):
    job = job_of(name)
    assert job.data.views != "middle"
    assert job.schedule(IMAGENET).factor(0) == 1


def test_there_are_those_that_the_help_names():
    assert NAMES == ["adagrad", "caffe-quick", "caffe-step", "paper", "small"]
    text = CliRunner().invoke(cli, ["launch", "--help"]).output
    for name in NAMES:
        assert name in text


def test_the_papers_rate_falls_by_4_percent_every_8_epochs():
    job = job_of("paper")
    schedule = job.schedule(IMAGENET)
    assert schedule.factor(8 * IMAGENET - 1) == 1
    assert schedule.factor(8 * IMAGENET) == pytest.approx(0.96)
    assert schedule.factor(249 * IMAGENET) == pytest.approx(0.96**31)
    assert (job.train.rule, job.train.n_fetch, job.train.n_push) == (SGD(momentum=0.9), 1, 1)
    assert job.average(IMAGENET).slots == ("average",)


def test_caffes_rates_are_those_of_its_solvers():
    quick, step = job_of("caffe-quick"), job_of("caffe-step")
    at = 1_200_000 * 32  # half of the 2,400,000 steps
    assert quick.schedule(IMAGENET).factor(at) == pytest.approx(0.5**0.5, rel=2e-3)
    assert step.schedule(IMAGENET).factor(320_000 * 32) == pytest.approx(0.96)
    assert step.schedule(IMAGENET).factor(320_000 * 32 - 1) == 1
    for job in (quick, step):
        weights, biases = job.train.groups
        assert (weights.lr, weights.weight_decay) == (0.01, 0.0002)
        assert (biases.lr, biases.weight_decay) == (0.02, 0.0)


def test_a_recipe_comes_first_and_all_else_wins(tmp_path):
    file = tmp_path / "job.toml"
    file.write_text("[train]\nmomentum = 0.5\nlr = 0.3\n")
    settings = gather([recipe("paper"), file], {"train.lr": 0.2})
    job = compose(settings)
    assert (job.train.lr, job.train.momentum, job.train.batch_size) == (0.2, 0.5, 32)
    assert settings.sources[0] == "recipe paper"


def test_the_shards_of_the_paper_keep_momentum_and_average():
    job = job_of(
        "paper", **{"data.source": "digits", "data.image_size": 32, "data.views": "middle"}
    )
    split = open_data(job, "train")
    assert split is not None
    contract = make_contract(job, make_model(job, split), len(split))
    assert contract.slots == ("momentum", "average")
    assert contract.schedule.every == 8 * len(split)


def test_an_unknown_recipe_is_a_problem_that_names_those_there_are():
    done = CliRunner().invoke(cli, ["launch", "--recipe", "papers", "--dry-run"])
    assert done.exit_code == 2
    assert "DB-USE-012" in done.output
    assert "paper, small" in done.output


def test_views_of_data_without_image_files_are_a_problem():
    job = load_job(None, {"data.views": "paper"}, ())
    split = open_data(job, "train")
    assert split is not None
    with pytest.raises(
        Problem, match=r"data\.views is 'paper', but digits holds no image"
    ) as caught:
        with_views(job, split)
    assert caught.value.code == "DB-DATA-007"


def test_views_are_drawn_by_the_seed_of_the_data(tmp_path):
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.linear_gradient("L").convert("RGB").save(tmp_path / name / "0.png")
    flags = {"data.source": f"folder:{tmp_path}", "data.views": "caffe", "data.image_size": 64}
    shown = []
    for more in ({"seed": 1}, {"seed": 2, "data.seed": 1}, {"seed": 1, "data.seed": 2}):
        job = load_job(None, {**flags, **more}, ())
        split = open_data(job, "train")
        assert split is not None
        assert isinstance(split.samples, Pictures)
        shown.append(with_views(job, split).samples.read([0, 1], 3).inputs)
        assert job.worker_config.seed == job.data_seed
    assert shown[0].equal(shown[1])
    assert not shown[0].equal(shown[2])


@pytest.mark.parametrize(("workers", "most"), [(1, 0.9), (2, 0.9), (4, 0.7), (8, 0.5), (9, 0.0)])
def test_momentum_that_is_high_for_the_workers_is_warned_of(workers, most):
    assert momentum_for(workers) == most
    high = load_job(None, {"workers": workers, "train.momentum": 0.95}, ())
    assert f"train.momentum={most:g}" in high.warnings()[0]
    assert not load_job(None, {"workers": workers, "train.momentum": most}, ()).warnings()
    assert not load_job(None, {"workers": workers, "train.optimizer": "adagrad"}, ()).warnings()


def test_a_tail_needs_a_length_and_epochs_exclude_samples():
    with pytest.raises(Problem, match="ends by the clock"):
        load_job(
            None, {"until": "20m", "train.average.kind": "mean", "train.average.tail": 0.5}, ()
        )
    with pytest.raises(Problem, match="not both"):
        load_job(None, {"train.schedule": {"kind": "step", "every": 5, "epochs": 1.0}}, ())
