"""The user's own data: what torch's DataLoader would take, and every mistake by its name."""

import importlib
import sys

import pytest
import torch

from distbelief.workers import own
from distbelief.workers.own import UserError, open_own
from distbelief.workers.split import Split

MODULE = '''
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

class Squares(Dataset):
    """Sample i is (i, i * i)."""
    def __init__(self, n=10):
        self.n = n
    def __len__(self):
        return self.n
    def __getitem__(self, i):
        return torch.full((1, 4, 4), float(i)), i * i

class Counted(Squares):
    num_classes = 7

class Listed(Squares):
    classes = ["cat", "dog"]

class Targeted(Squares):
    targets = [0, 4, 2]

class Labelled(Squares):
    targets = torch.tensor([0, 5])

class Many(Squares):
    def __getitems__(self, indices):
        return [(torch.tensor([i, 0.0]), -i) for i in indices]
    def __getitem__(self, i):
        raise AssertionError("one by one")

class Words(Squares):
    def __getitem__(self, i):
        inputs = {"ids": torch.tensor([i, i]), "mask": torch.ones(2)}
        return inputs, (torch.tensor(i), torch.zeros(3))

class Numbers(IterableDataset):
    begun = 0
    def __init__(self, n=10):
        self.n = n
    def __iter__(self):
        Numbers.begun += 1
        for i in range(self.n):
            yield torch.tensor([float(i)]), i

class Sized(Numbers):
    def __len__(self):
        return 8

class Short(Numbers):
    def __len__(self):
        return 12

class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.zeros(1), 0

class Odd(Squares):
    def __init__(self, row):
        super().__init__()
        self.row = row
    def __getitem__(self, i):
        return self.row

class NoLength(Dataset):
    def __getitem__(self, i):
        return 0, 0

class Broken(Squares):
    def __getitem__(self, i):
        return self.load(i)
    def load(self, i):
        raise OSError(f"no page {i}")

class Picture:
    pass

def squares(split): return Squares()
def two(split): return Squares(10) if split == "train" else Squares(3)
def only_train(split): return Squares() if split == "train" else None
def counted(split): return Counted()
def listed(split): return Listed()
def targeted(split): return Targeted()
def labelled(split): return Labelled()
def many(split): return Many()
def words(split): return Words()
def tensors(split): return TensorDataset(torch.arange(4.0), torch.arange(4))
def pairs(split): return [(torch.tensor(1.0), 2), [torch.tensor(3.0), 4]]
def stream(split): return Numbers()
def sized(split): return Sized()
def short(split): return Short()
def endless(split): return Endless()
def empty(split): return Squares(0)
def empty_stream(split): return Numbers(0)
def nothing(split): return None
def loader(split): return DataLoader(Squares())
def mapping(split): return {"train": 1}
def number(split): return 3
def no_length(split): return NoLength()
def one(split): return Odd(torch.zeros(3))
def three(split): return Odd((1, 2, 3))
def dictionary(split): return Odd({"x": 1, "y": 2})
def alone(split): return Odd(5)
def picture(split): return Odd((Picture(), 1))
def broken(split): return Broken()
def raising(split):
    return deeper(split)
def deeper(split):
    raise KeyError(split)
def no_arguments(): return Squares()
not_callable = 5
'''


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The user's folder with own_data.py in it, as the current one."""
    (tmp_path / "own_data.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    importlib.invalidate_caches()
    yield tmp_path
    sys.modules.pop("own_data", None)


def opened(name: str, split: str = "train") -> Split:
    found = open_own(f"own_data:{name}", split)
    assert found is not None
    return found


def test_a_dataset_is_read_and_collated_as_torch_does():
    split = opened("squares")
    assert (len(split), split.num_classes, split.input_shape) == (10, None, (1, 4, 4))
    assert not split.is_ordered
    assert not split.is_decoding  # it brings its own floats
    read = split.samples.read([3, 1])
    assert read.inputs.shape == (2, 1, 4, 4)
    assert read.inputs[:, 0, 0, 0].tolist() == [3, 1]
    assert read.targets.tolist() == [9, 1]
    assert (read.num_good, read.bad) == (2, ())


def test_the_function_is_told_the_name_of_the_split():
    assert (len(opened("two")), len(opened("two", "test"))) == (10, 3)


def test_none_for_test_means_that_there_is_no_test_split():
    assert open_own("own_data:only_train", "test") is None


@pytest.mark.parametrize(
    ("name", "num_classes"),
    [("counted", 7), ("listed", 2), ("targeted", 5), ("labelled", 6), ("squares", None)],
)
def test_the_number_of_classes_is_found_where_torch_datasets_have_it(name, num_classes):
    assert opened(name).num_classes == num_classes


def test_a_dataset_that_reads_many_at_once_is_asked_for_many():
    read = opened("many").samples.read([4, 2])
    assert read.inputs.tolist() == [[4, 0], [2, 0]]
    assert read.targets.tolist() == [-4, -2]


def test_inputs_and_targets_may_be_structures():
    split = opened("words")
    assert split.input_shape is None
    read = split.samples.read([1, 2])
    assert read.inputs["ids"].tolist() == [[1, 1], [2, 2]]
    assert [tuple(target.shape) for target in read.targets] == [(2,), (2, 3)]


@pytest.mark.parametrize(("name", "inputs"), [("tensors", [0, 1]), ("pairs", [1, 3])])
def test_tensor_datasets_and_lists_of_pairs_are_datasets_too(name, inputs):
    assert opened(name).samples.read([0, 1]).inputs.tolist() == inputs


# Streams


def test_a_stream_is_read_by_positions_in_its_own_order():
    split = opened("stream")
    assert split.is_ordered
    assert len(split) == 10
    assert split.samples.read([0, 1, 2]).targets.tolist() == [0, 1, 2]
    assert split.samples.read([6, 7]).targets.tolist() == [6, 7]  # others have 3 to 5
    assert split.samples.read([9]).targets.tolist() == [9]
    assert split.samples.read([2, 3]).targets.tolist() == [2, 3]  # the next epoch


def test_a_stream_is_begun_again_only_for_a_position_behind():
    split = opened("sized")
    numbers = sys.modules["own_data"].Numbers
    before = numbers.begun
    for start in range(0, 8, 2):
        split.samples.read([start, start + 1])
    assert numbers.begun == before + 1
    split.samples.read([0])
    assert numbers.begun == before + 2


def test_the_length_of_a_stream_is_its_own_word():
    assert len(opened("sized")) == 8


def test_a_stream_that_ends_early_is_an_error():
    split = opened("short")
    with pytest.raises(UserError, match=r"own_data:short\('train'\) ended after 10 .* was 12"):
        split.samples.read([9, 10])


def test_a_stream_that_does_not_end_needs_a_length(monkeypatch):
    monkeypatch.setattr(own, "COUNT_S", 0.05)
    with pytest.raises(UserError, match=r"has no __len__, and after 0 s and \d+ samples") as caught:
        opened("endless")
    assert "give it a __len__" in caught.value.fix


# Mistakes


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("empty", r"own_data:empty\('train'\) has no samples"),
        ("empty_stream", "has no samples"),
        ("nothing", "returned None: there must be a training split"),
        ("loader", "returned a DataLoader: return the dataset that it was made of"),
        ("mapping", "returned a dict, not a torch Dataset or IterableDataset"),
        ("number", "returned a int, not a torch Dataset"),
        ("no_length", "returned a NoLength that has no __len__"),
        ("one", r"sample 0 of own_data:one\('train'\) is a Tensor of 3, not an \(input, target\)"),
        ("three", "is a tuple of 3, not"),
        ("dictionary", "is a dict of 2, not"),
        ("alone", "is a 5, not an"),
        ("picture", r"\(Picture and int\) cannot become a batch: .*Picture"),
        ("no_arguments", "raised TypeError: no_arguments.. takes 0 positional"),
        ("not_callable", "own_data has no callable 'not_callable'"),
        ("no_such", "own_data has no callable 'no_such'"),
    ],
)
def test_every_mistake_is_named(name, text):
    with pytest.raises(UserError, match=text):
        open_own(f"own_data:{name}", "train")


def test_a_function_that_raises_shows_the_users_frames_and_none_of_ours():
    with pytest.raises(UserError, match=r"raising\('train'\) raised KeyError: 'train'") as caught:
        opened("raising")
    frames = caught.value.frames
    assert "in raising" in frames
    assert "in deeper" in frames
    assert "own.py" not in frames


def test_a_first_sample_that_raises_shows_the_users_frames():
    with pytest.raises(UserError, match=r"first sample of .* raised OSError: no page 0") as caught:
        opened("broken")
    assert "in load" in caught.value.frames
    assert "own.py" not in caught.value.frames


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(UserError, match="importing nowhere_data raised ModuleNotFoundError"):
        open_own("nowhere_data:f", "train")


@pytest.mark.parametrize("name", ["model", "workers", "param_server", "data", "split"])
def test_a_users_file_may_have_any_name(folder, name):
    import distbelief.workers.data

    (folder / f"{name}.py").write_text(MODULE)
    try:
        split = open_own(f"{name}:squares", "train")
        assert split is not None
        assert sys.modules[name].__file__ == str(folder / f"{name}.py")
        assert sys.modules["distbelief.workers.data"] is distbelief.workers.data
    finally:
        sys.modules.pop(name, None)


def test_an_error_of_the_users_own_passes_through_a_read():
    split = opened("squares")
    split.samples._dataset.load = None  # type: ignore[attr-defined]  # a user's dataset
    broken = sys.modules["own_data"].Broken()
    with pytest.raises(OSError, match="no page 4"):
        own.Rows(broken).read([4])


def test_digests_are_of_the_length_alone():
    assert opened("squares").digest == opened("stream").digest
    assert opened("squares").digest != opened("two", "test").digest
    assert torch.is_tensor(opened("tensors").samples.read([0]).inputs)
