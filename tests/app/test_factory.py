"""The factory: from a name to a model, from the user's own folder, with the user's own errors."""

import importlib
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from distbelief.factory import make_contract, make_model, num_loaders, open_data, try_model
from distbelief.job import Job, load_job
from distbelief.problem import Problem
from distbelief.workers.embedded import split_of
from distbelief.workers.own import UserError
from distbelief.workers.split import Read, Split
from tests.workers.test_pixels import GOOD

INPUTS = torch.zeros(4, 1, 16, 16)
IMAGES = split_of(INPUTS, torch.tensor([0, 1, 2, 3]), 10, "train")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The user's folder, as the current one; what is imported from it is forgotten again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    importlib.invalidate_caches()
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", "") and str(tmp_path) in str(
            sys.modules[name].__file__
        ):
            del sys.modules[name]


def job_of(model: str, *settings: str) -> Job:
    return load_job(None, {"model.factory": model}, settings)


NET = """
from torch import nn

class Net(nn.Linear):
    def __init__(self, num_classes, image_size, hidden=3):
        super().__init__(image_size, num_classes)
        self.hidden = hidden
"""


@pytest.mark.parametrize("name", ["my_net", "model", "workers", "param_server", "job"])
def test_a_users_file_may_have_any_name(folder, name):
    import distbelief.model.googlenet
    import distbelief.workers.lease

    (folder / f"{name}.py").write_text(NET)
    model = make_model(job_of(f"{name}:Net"), IMAGES)
    assert type(model).__module__ == name
    assert isinstance(model, nn.Linear)
    assert (model.in_features, model.out_features) == (16, 10)
    assert sys.modules["distbelief.model.googlenet"] is distbelief.model.googlenet
    assert sys.modules["distbelief.workers.lease"] is distbelief.workers.lease


def test_the_users_folder_may_be_a_package(folder):
    (folder / "nets").mkdir()
    (folder / "nets" / "__init__.py").write_text("")
    (folder / "nets" / "small.py").write_text(NET)
    assert isinstance(make_model(job_of("nets.small:Net"), IMAGES), nn.Linear)


def linear(job: Job) -> nn.Linear:
    model = make_model(job, IMAGES)
    assert isinstance(model, nn.Linear)
    return model


def test_arguments_of_the_job_win_over_what_is_offered(folder):
    (folder / "args_net.py").write_text(NET)
    job = job_of("args_net:Net", "model.args.hidden=7", "model.args.num_classes=4")
    model = linear(job)
    assert model.out_features == 4
    assert vars(model)["hidden"] == 7


def test_the_same_seed_gives_the_same_model(folder):
    (folder / "seeded.py").write_text(NET)
    first, second, other = (linear(job_of("seeded:Net", f"seed={seed}")) for seed in (1, 1, 2))
    assert first.weight.equal(second.weight)
    assert not first.weight.equal(other.weight)


def test_a_factory_that_raises_shows_the_users_frames_and_none_of_ours(folder):
    (folder / "raising.py").write_text(
        "def net(num_classes):\n    return build(num_classes)\n\n"
        "def build(n):\n    raise KeyError('no such layer')\n"
    )
    with pytest.raises(Problem) as caught:
        make_model(job_of("raising:net"), IMAGES)
    problem = caught.value
    assert problem.code == "DB-MODEL-001"
    assert problem.what == "the model factory raising:net raised KeyError: 'no such layer'"
    assert "raising.py" in problem.why
    assert "in build" in problem.why
    assert "factory.py" not in problem.why
    assert problem.fix == (
        'call it yourself: python -c "from raising import net; net(num_classes=10)"'
    )
    assert str(problem).startswith("error[DB-MODEL-001]: ")


def test_a_module_that_raises_shows_the_users_frames_and_not_the_import_machinery(folder):
    (folder / "at_import.py").write_text("x = 1\ny = x / 0\n")
    with pytest.raises(Problem) as caught:
        make_model(job_of("at_import:net"), IMAGES)
    assert caught.value.what == "importing at_import raised ZeroDivisionError: division by zero"
    assert "at_import.py" in caught.value.why
    assert "importlib" not in caught.value.why
    assert "factory.py" not in caught.value.why


def test_a_script_that_ends_the_process_when_imported_is_an_error(folder):
    (folder / "script.py").write_text("import sys\nsys.exit(2)\n")
    with pytest.raises(Problem, match="importing script raised SystemExit: 2"):
        make_model(job_of("script:net"), IMAGES)


@pytest.mark.parametrize(
    ("model", "code", "text"),
    [
        ("nowhere:Net", "DB-MODEL-001", "importing nowhere raised ModuleNotFoundError"),
        ("torch.nn:Nothing", "DB-MODEL-001", "torch.nn has no callable 'Nothing'"),
        ("torch.nn:init", "DB-MODEL-001", "torch.nn has no callable 'init'"),
        ("resnet", "DB-USE-003", "'resnet' is neither googlenet, googlenet-small nor"),
        (":Net", "DB-USE-003", "':Net' is neither"),
        ("torch:", "DB-USE-003", "'torch:' is neither"),
        ("collections:OrderedDict", "DB-MODEL-002", "returned a OrderedDict, not an nn.Module"),
        ("torch.nn:Linear", "DB-MODEL-001", "factory torch.nn:Linear raised TypeError"),
    ],
)
def test_a_model_that_cannot_be_made_is_refused(model, code, text):
    with pytest.raises(Problem) as caught:
        make_model(job_of(model), IMAGES)
    assert caught.value.code == code
    assert text in caught.value.what


def test_a_width_needs_a_factory_that_takes_one(folder):
    (folder / "fixed.py").write_text(NET)
    with pytest.raises(Problem, match=r"fixed:Net takes no width, but width is 0\.5"):
        make_model(job_of("fixed:Net", "model.width=0.5"), IMAGES)


def test_the_small_googlenet_takes_width_and_classes():
    model = make_model(job_of("googlenet-small", "model.width=0.1"), IMAGES)
    assert model.eval()(INPUTS).shape == (4, 10)
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


class Odd(nn.Module):
    def __init__(self, parameter) -> None:
        super().__init__()
        self.fine = nn.Linear(2, 2)
        self.odd = parameter


ODD = {
    "lazy": (nn.LazyLinear(3), r"parameter odd\.weight is lazy"),
    "complex": (
        nn.Parameter(torch.zeros(3, dtype=torch.complex64)),
        r"parameter odd \[3\] is complex",
    ),
    "integer": (
        nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False),
        r"parameter odd \[3\] is of int64",
    ),
    "sparse": (nn.Parameter(torch.eye(3).to_sparse()), r"parameter odd \[3, 3\] is sparse"),
    "sparse gradient": (
        nn.Embedding(3, 2, sparse=True),
        r"odd\.weight will have sparse gradients",
    ),
}


@pytest.mark.parametrize(("parameter", "text"), ODD.values(), ids=ODD)
def test_a_parameter_that_cannot_be_trained_is_refused_by_name(parameter, text):
    with pytest.raises(Problem, match=text) as caught:
        make_contract(Job(shards=1), Odd(parameter), 100)
    assert caught.value.code == "DB-MODEL-003"


def test_more_shards_than_parts_are_refused_with_a_number_that_works():
    with pytest.raises(
        Problem, match=r"2 shards for a model of 6 parameters.* use at most 1 shard"
    ):
        make_contract(Job(shards=2), nn.Linear(2, 2), 100)


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(Problem, match="no trainable parameter"):
        make_contract(Job(shards=1), nn.ReLU(), 100)


def test_the_contract_holds_rule_schedule_clipping_groups_and_buffers():
    settings = ("shards=1", "train.clip_part_norm=2", "train.bias_lr=2", "until=3-epochs")
    contract = make_contract(load_job(None, {}, settings), nn.BatchNorm1d(3), 50)
    assert contract.rule == Job().train.rule
    assert contract.schedule.total == 150
    assert contract.clip_part_norm == 2
    assert [group.lr for group in contract.layout.groups] == [0.005, 0.01]
    assert [entry.group for entry in contract.layout.entries] == [1, 1]
    assert contract.buffers.num_floats == 6


def test_images_come_in_the_size_that_suits_their_source():
    for settings, size in (((), 16), (("data.image_size=8",), 8)):
        split = open_data(load_job(None, {}, settings), "test")
        assert split is not None
        assert (len(split), split.input_shape) == (360, (1, size, size))


def test_data_that_cannot_be_opened_is_a_problem(tmp_path):
    with pytest.raises(Problem, match="no train-images-idx3-ubyte") as caught:
        open_data(load_job(None, {"data.source": f"fashion-mnist:{tmp_path}"}, ()), "train")
    assert (caught.value.code, caught.value.exit_code) == ("DB-DATA-001", 2)


def test_a_model_that_does_not_fit_the_data_is_found_before_the_start():
    images = split_of(torch.randn(40, 1, 4, 4), torch.zeros(40, dtype=torch.int64), 3, "train")
    with pytest.raises(Problem, match=r"a first batch \[32, 1, 4, 4\] failed in Linear") as caught:
        try_model(Job(), torch.nn.Linear(7, 3), images)
    assert caught.value.code == "DB-MODEL-005"


def test_the_trial_leaves_the_model_as_it_was():
    images = split_of(torch.randn(40, 6), torch.zeros(40, dtype=torch.int64), 6, "train")
    model = torch.nn.BatchNorm1d(6).eval()
    try_model(Job(), model, images)
    assert int(model.state_dict()["num_batches_tracked"]) == 0
    assert not model.training


def test_a_test_split_that_is_not_there_is_none(folder):
    (folder / "cat").mkdir()
    (folder / "cat" / "a.png").write_bytes(GOOD)
    job = load_job(None, {"data.source": f"folder:{folder}"}, ())
    assert open_data(job, "train") is not None
    assert open_data(job, "test") is None


def test_what_goes_wrong_in_the_users_own_data_is_a_problem_with_their_frames(folder):
    (folder / "my_data.py").write_text(
        "def images(split):\n    return load(split)\n\n"
        "def load(split):\n    raise KeyError(split)\n"
    )
    with pytest.raises(Problem, match=r"my_data:images\('train'\) raised KeyError") as caught:
        open_data(load_job(None, {"data.source": "my_data:images"}, ()), "train")
    assert (caught.value.code, caught.value.exit_code) == ("DB-DATA-004", 2)
    assert "in load" in caught.value.why
    assert "own.py" not in caught.value.why


def test_an_unknown_source_is_a_problem():
    with pytest.raises(Problem, match="data source 'cifar' is none of digits"):
        open_data(load_job(None, {"data.source": "cifar"}, ()), "train")


def unknown(num_classes: int | None, shape: tuple[int, int, int] | None) -> Split:
    return replace(IMAGES, num_classes=num_classes, input_shape=shape)


def test_a_model_is_offered_only_what_the_data_tells(folder):
    (folder / "asking.py").write_text(
        "from torch import nn\n"
        "def net(num_classes=5, in_channels=6, image_size=7, width=8):\n"
        "    net = nn.Linear(1, 1)\n"
        "    net.given = num_classes, in_channels, image_size, width\n"
        "    return net\n"
    )
    for split, given in (
        (IMAGES, (10, 1, 16, 1)),
        (unknown(None, (3, 8, 8)), (5, 3, 8, 1)),
        (unknown(4, (3, 8, 9)), (4, 3, 7, 1)),  # not a square
        (unknown(None, None), (5, 6, 7, 1)),
    ):
        assert vars(make_model(job_of("asking:net"), split))["given"] == given


def test_a_model_that_needs_what_the_data_does_not_tell_gets_a_hint(folder):
    (folder / "needing.py").write_text(NET)
    with pytest.raises(Problem, match="missing 2 required positional") as caught:
        make_model(job_of("needing:Net"), unknown(None, None))
    assert caught.value.fix.startswith("digits does not tell image_size, num_classes: --set model.")


class Holed:
    """Samples of which the first ones cannot be read."""

    def __init__(self, num_bad: int, num: int = 40) -> None:
        self.num_bad = num_bad
        self.num = num
        self.num_read = 0

    def __len__(self) -> int:
        return self.num

    def read(self, indices, epoch=0) -> Read:
        self.num_read += len(indices)
        good = [index for index in indices if index >= self.num_bad]
        bad = tuple((f"file{index}", "torn") for index in indices if index < self.num_bad)
        if not good:
            return Read(None, None, 0, bad)
        return Read(torch.zeros(len(good), 6), torch.zeros(len(good)).long(), len(good), bad)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("num_bad", [1, 3, 4, 20])
def test_the_trial_survives_bad_first_samples(num_bad):
    samples = Holed(num_bad)
    split = replace(IMAGES, samples=samples)
    try_model(load_job(None, {}, ("train.batch_size=4",)), nn.BatchNorm1d(6), split)
    assert samples.num_read < 40


def test_a_trial_without_a_single_sample_is_a_problem():
    split = replace(IMAGES, samples=Holed(1000, 1000))
    with pytest.raises(Problem, match="the first 40 samples cannot be read; file0: torn") as caught:
        try_model(load_job(None, {}, ("train.batch_size=4",)), nn.BatchNorm1d(6), split)
    assert caught.value.code == "DB-DATA-006"


def test_data_that_raises_in_the_trial_is_a_problem():
    class Torn(Holed):
        def read(self, indices, epoch=0) -> Read:
            raise UserError("the stream ended")

    with pytest.raises(Problem, match="a first batch raised UserError: the stream") as caught:
        try_model(Job(), nn.BatchNorm1d(6), replace(IMAGES, samples=Torn(0)))
    assert caught.value.code == "DB-DATA-004"


def test_loaders_are_the_jobs_or_what_suits_the_data():
    assert num_loaders(Job(), IMAGES) == 0
    assert num_loaders(Job(workers=64), replace(IMAGES, is_decoding=True)) == 1
    assert num_loaders(load_job(None, {}, ("data.loaders=5",)), IMAGES) == 5
    zero = load_job(None, {}, ("data.loaders=0",))
    assert num_loaders(zero, replace(IMAGES, is_decoding=True)) == 0
