"""Embedded data: the same on every machine, and files that are not what they should be."""

import gzip
import hashlib
import tracemalloc

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from distbelief.workers.data import open_split
from distbelief.workers.embedded import Tensors, open_digits
from distbelief.workers.split import Split


def load(source: str, name: str, image_size: int = 0) -> Tensors:
    tensors = open_split(source, name, image_size)
    assert tensors is not None
    assert isinstance(tensors.samples, Tensors)
    return tensors.samples


def idx(array: np.ndarray, magic: int | None = None) -> bytes:
    """An array as an IDX file of bytes."""
    header = (magic or 0x0800 + array.ndim).to_bytes(4, "big")
    return header + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


@pytest.fixture
def folder(tmp_path):
    """Ten images and labels of the training split, one of each class."""
    pixels = np.arange(10 * 28 * 28, dtype=np.uint8).reshape(10, 28, 28)
    write(tmp_path, images=idx(pixels), labels=idx(np.arange(10, dtype=np.uint8)))
    return tmp_path


def write(folder, **files: bytes):
    names = {"images": "train-images-idx3-ubyte", "labels": "train-labels-idx1-ubyte"}
    for kind, content in files.items():
        (folder / names[kind]).write_bytes(content)


def digest(images: Tensors) -> str:
    content = images.targets.numpy().tobytes() + (images.inputs * 16).round().numpy().tobytes()
    return hashlib.sha256(content).hexdigest()[:16]


def test_digits_are_split_once_and_for_all():
    train, test = load("digits", "train"), load("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.inputs.shape == (1437, 1, 8, 8)
    assert train.inputs.dtype == torch.float32
    assert train.targets.dtype == torch.int64
    assert train.targets.tolist()[:10] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert digest(train) == "856a4a37389066f1"
    assert digest(test) == "349af238d2baf5cc"


def test_the_splits_of_digits_are_stratified():
    train, test = load("digits", "train"), load("digits", "test")
    assert train.targets.bincount().tolist() == [142, 146, 142, 146, 145, 145, 145, 143, 139, 144]
    assert test.targets.bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]


def test_no_digit_is_in_both_splits():
    rows = torch.cat([load("digits", split).inputs.flatten(1) for split in ("train", "test")])
    assert len(torch.unique(rows, dim=0)) == 1797


def test_digits_are_standardised_by_the_training_split():
    train = load("digits", "train").inputs
    assert abs(float(train.mean())) < 1e-6
    assert abs(float(train.std()) - 1) < 1e-4


def test_fashion_mnist_is_complete_and_balanced(fashion_mnist_dir):
    for split, each in (("train", 6000), ("test", 1000)):
        images = load(f"fashion-mnist:{fashion_mnist_dir}", split)
        assert images.inputs.shape == (10 * each, 1, 28, 28)
        assert images.targets.bincount().tolist() == [each] * 10
    assert abs(float(images.inputs.mean())) < 0.02


def test_a_batch_holds_the_samples_of_its_indices(folder):
    images = load(f"fashion-mnist:{folder}", "train")
    read = images.read([7, 2])
    assert read.targets.tolist() == [7, 2]
    assert read.inputs.equal(images.inputs[[7, 2]])
    assert (read.num_good, read.bad) == (2, ())


def test_the_split_says_what_a_model_needs_to_know(folder):
    split = open_split(f"fashion-mnist:{folder}", "train", 32)
    assert split is not None
    assert (len(split), split.name, split.num_classes) == (10, "train", 10)
    assert split.input_shape == (1, 32, 32)
    assert not split.is_ordered
    assert not split.is_decoding


def test_digests_tell_splits_and_labels_apart(folder):
    def split() -> Split:
        opened = open_split(f"fashion-mnist:{folder}", "train")
        assert opened is not None
        return opened

    before = split().digest
    assert split().digest == before
    write(folder, labels=idx(np.zeros(10, np.uint8)))
    assert split().digest != before


def test_files_may_be_zipped_or_not(folder):
    plain = load(f"fashion-mnist:{folder}", "train")
    for path in list(folder.iterdir()):
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    zipped = load(f"fashion-mnist:{folder}", "train")
    assert zipped.inputs.equal(plain.inputs)
    assert zipped.targets.tolist() == list(range(10))


@pytest.mark.parametrize("size", [14, 28, 32])
def test_images_are_resized(folder, size):
    images = load(f"fashion-mnist:{folder}", "train", image_size=size)
    assert images.inputs.shape == (10, 1, size, size)
    assert len(images) == 10


BROKEN = {
    "truncated": (idx(np.zeros((10, 28, 28), np.uint8))[:-1], r"holds 7839 bytes of data, its"),
    "longer than it says": (idx(np.zeros((10, 28, 28), np.uint8)) + b"0", "holds 7841 bytes"),
    "of another kind": (idx(np.zeros(10, np.uint8)), "is not an IDX file of 3 dimensions"),
    "empty": (b"", "is not an IDX file"),
    "cut in its header": (idx(np.zeros((10, 28, 28), np.uint8))[:11], "is not an IDX file"),
    "of a size no machine has": (
        b"\0\0\x08\x03" + b"\xff" * 12,
        r"holds 0 bytes of data, its header says \(4294967295,",
    ),
}


@pytest.mark.parametrize(("content", "text"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_with_its_path(folder, content, text):
    write(folder, images=content)
    with pytest.raises(ValueError, match=text) as caught:
        load(f"fashion-mnist:{folder}", "train")
    assert str(folder / "train-images-idx3-ubyte") in str(caught.value)


ZIPPED = gzip.compress(idx(np.zeros((10, 28, 28), np.uint8)))


@pytest.mark.parametrize(
    "content",
    [b"not gzip at all", ZIPPED[:-9], ZIPPED[:20] + b"\xff\xff\xff" + ZIPPED[23:], b""],
    ids=["other", "truncated", "corrupt", "empty"],
)
def test_a_broken_gzip_file_is_refused_with_its_path(folder, content):
    (folder / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz"):
        load(f"fashion-mnist:{folder}", "train")


def test_what_unpacks_to_more_than_it_says_is_not_unpacked(folder):
    """A bomb: 100 MB of zeros in 100 kB, where 10 images were announced."""
    content = idx(np.zeros((10, 28, 28), np.uint8)) + bytes(100_000_000)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content, 1))
    del content
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="holds 7841 bytes of data, its header"):
            load(f"fashion-mnist:{folder}", "train")
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_images_and_labels_of_different_number_are_refused(folder):
    write(folder, labels=idx(np.zeros(9, np.uint8)))
    with pytest.raises(ValueError, match=f"{folder}: 10 images but 9 labels in train"):
        load(f"fashion-mnist:{folder}", "train")


def test_a_label_beyond_nine_is_refused(folder):
    write(folder, labels=idx(np.full(10, 10, np.uint8)))
    with pytest.raises(ValueError, match=f"{folder}: a label is 10"):
        load(f"fashion-mnist:{folder}", "train")


def test_files_without_a_single_image_are_refused(folder):
    write(folder, images=idx(np.zeros((0, 28, 28), np.uint8)), labels=idx(np.zeros(0, np.uint8)))
    with pytest.raises(ValueError, match=f"{folder}: no images in train"):
        load(f"fashion-mnist:{folder}", "train")


def test_missing_files_are_named_with_what_to_install(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no t10k-images-idx3-ubyte.* apt-get install"):
        load(f"fashion-mnist:{tmp_path}", "test")


def test_the_test_digits_are_those_of_scikit_learns_stratified_split():
    images, targets = load_digits(return_X_y=True)
    parts = train_test_split(images, targets, test_size=360, stratify=targets, random_state=0)
    train, test, _, labels = parts
    ours = open_digits("test", 0)
    expected = sorted(map(tuple, ((test - train.mean()) / train.std()).astype("float32").tolist()))
    got = ours.samples.read(range(360))
    assert got.targets.bincount().tolist() == torch.tensor(labels).bincount().tolist()
    rows = sorted(map(tuple, got.inputs.view(360, 64).tolist()))
    assert torch.tensor(rows).allclose(torch.tensor(expected), atol=1e-6)


def test_digits_are_read_without_their_library_and_the_same_with_it(monkeypatch):
    fast = open_digits("train", 0)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    slow = open_digits("train", 0)
    assert fast.digest == slow.digest
    assert fast.samples.read([0, 1436]).inputs.equal(slow.samples.read([0, 1436]).inputs)
