"""Data: which source a name means."""

import pytest
import torch

from distbelief.workers.data import open_split
from distbelief.workers.split import Names, digest_of


@pytest.mark.parametrize(
    "source",
    ["cifar", "", "digits:somewhere", "folder", "folder:", "wds", "wds:", "module:", ":f", "a b:c"],
)
def test_an_unknown_source_is_refused(source):
    with pytest.raises(ValueError, match=f"data source '{source}' is none of digits, .*module:f"):
        open_split(source, "train")


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split 'valid' is none of train, test"):
        open_split("digits", "valid")


def test_a_negative_size_is_refused():
    with pytest.raises(ValueError, match="image_size must be at least 0, got -1"):
        open_split("digits", "train", -1)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("folder:/nowhere/at/all", "/nowhere/at/all does not exist: .* on every machine"),
        ("wds:/nowhere/{000..002}.tar", "/nowhere/000.tar matches no file: .* on every machine"),
    ],
)
def test_a_path_that_is_missing_is_named(source, text):
    with pytest.raises(FileNotFoundError, match=text):
        open_split(source, "train")


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/pictures does not exist"):
        open_split("folder:~/pictures", "train")


def test_names_are_a_list_of_texts_in_one_block():
    texts = ["a/b.jpg", "", "\N{SNOWMAN}.png", "raw\udcff.png"]
    names = Names(texts)
    assert list(names) == texts
    assert (len(names), names[-1], names[1:3]) == (4, "raw\udcff.png", ["", "\N{SNOWMAN}.png"])
    with pytest.raises(IndexError):
        names[4]
    assert bytes(Names(["ab", "c"])) != bytes(Names(["a", "bc"]))


def test_a_digest_knows_where_a_piece_ends():
    assert digest_of(b"ab", b"c") != digest_of(b"a", b"bc")
    assert digest_of(b"ab", b"c") == digest_of(b"ab", b"c")


def test_the_first_read_of_digits_is_the_whole_batch_at_once():
    split = open_split("digits", "train", 16)
    assert split is not None
    read = split.samples.read(range(64))
    assert read.inputs.shape == (64, 1, 16, 16)
    assert read.targets.dtype == torch.int64
