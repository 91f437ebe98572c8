"""WebDataset shards: samples by key, tars of every dialect, and tars that are damaged."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from distbelief.workers import tars
from distbelief.workers.split import Split
from distbelief.workers.tars import TarFiles, index_of, members, open_tars


def png(colour=(9, 9, 9), size=(10, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def write(path: Path, files, form=tarfile.USTAR_FORMAT) -> Path:
    """A tar of (name, content) pairs."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(key: str, target: int, colour=None) -> list[tuple[str, bytes]]:
    return [
        (f"{key}.png", png(colour or (target, target, target))),
        (f"{key}.cls", str(target).encode()),
    ]


def shard(path: Path, *targets: int) -> Path:
    return write(path, [f for i, t in enumerate(targets) for f in sample(f"{path.stem}-{i}", t)])


def opened(pattern: object, split: str = "train", image_size: int = 4) -> Split:
    found = open_tars(str(pattern), split, image_size)
    assert found is not None
    return found


def all_of(split: Split) -> list[tuple[int, int]]:
    """(colour, class) of each sample."""
    try:
        read = split.samples.read(range(len(split)))
    finally:
        split.samples.close()
    assert read.bad == ()
    return [(int(x[0, 0, 0]), int(y)) for x, y in zip(read.inputs, read.targets, strict=True)]


def test_samples_are_read_from_all_shards_in_order(tmp_path):
    shard(tmp_path / "b.tar", 3, 1)
    shard(tmp_path / "a.tar", 2, 0, 2)
    split = opened(tmp_path / "*.tar")
    assert (len(split), split.num_classes, split.input_shape) == (5, 4, (3, 4, 4))
    assert split.is_decoding
    assert all_of(split) == [(2, 2), (0, 0), (2, 2), (3, 3), (1, 1)]


def test_any_order_of_reading_gives_the_same_samples(tmp_path):
    shard(tmp_path / "a.tar", 2, 0, 2)
    shard(tmp_path / "b.tar", 3, 1)
    split = opened(tmp_path / "*.tar")
    assert split.samples.read([4, 0, 3, 0]).targets.tolist() == [1, 2, 3, 2]
    split.samples.close()


# Patterns


def test_a_range_names_every_shard(tmp_path):
    for number in range(3):
        shard(tmp_path / f"s-{number:03}.tar", number)
    shard(tmp_path / "s-003.tar", 3)
    assert len(opened(tmp_path / "s-{000..002}.tar")) == 3
    assert len(opened(tmp_path / "s-{000,003}.tar")) == 2
    with pytest.raises(FileNotFoundError, match=r"s-004\.tar matches no file: the shards of wds:"):
        open_tars(str(tmp_path / "s-{000..004}.tar"), "train", 4)


def test_so_many_samples_are_too_many_for_one_tar(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "MAX_SAMPLES", 3)
    assert len(opened(shard(tmp_path / "three.tar", 0, 1, 2))) == 3
    with pytest.raises(ValueError, match=r"four\.tar holds more than 3 samples"):
        opened(shard(tmp_path / "four.tar", 0, 1, 2, 3))


def test_a_name_that_is_a_book_is_refused(tmp_path):
    path = write(tmp_path / "s.tar", sample("k" * 5000, 0), tarfile.GNU_FORMAT)
    with pytest.raises(ValueError, match="a name of 5000 characters: kkkk"):
        opened(path)


def test_split_in_the_pattern_stands_for_its_name(tmp_path):
    for number in (0, 1):
        shard(tmp_path / f"train-{number}.tar", number, 5)
    shard(tmp_path / "test-0.tar", 1)
    for pattern in ("{split}-*.tar", "{split}-{0..0}.tar"):
        test = opened(tmp_path / pattern, "test")
        assert (len(test), test.num_classes, test.name) == (1, 6, "test")
    assert len(opened(tmp_path / "{split}-{0..1}.tar")) == 4
    assert len(opened(tmp_path / "{split}-*.tar")) == 4


def test_val_is_the_test_split_where_there_is_no_other(tmp_path):
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
        shard(tmp_path / name / "0.tar", *range(len(name)))
    assert len(opened(tmp_path / "{split}" / "*.tar", "test")) == 3


def test_a_test_split_that_the_pattern_promises_must_be_there(tmp_path):
    shard(tmp_path / "train-0.tar", 0)
    with pytest.raises(FileNotFoundError, match=r"test-\*\.tar matches no file: .* nor are .* val"):
        open_tars(str(tmp_path / "{split}-*.tar"), "test", 4)


def test_without_split_in_the_pattern_there_is_no_test_split(tmp_path):
    shard(tmp_path / "a.tar", 0)
    assert open_tars(str(tmp_path / "*.tar"), "test", 4) is None


def test_a_path_may_hold_what_looks_like_a_pattern(tmp_path):
    shard(tmp_path / "a[1].tar", 0)
    assert len(opened(tmp_path / "a[1].tar")) == 1


def test_unbalanced_braces_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"wds:.*a-\{000\.\.\.tar"):
        open_tars(str(tmp_path / "a-{000...tar"), "train", 4)


def test_commands_are_not_run():
    with pytest.raises(ValueError, match="commands are not run"):
        open_tars("pipe:cat a.tar", "train", 4)


# Classes


def test_the_list_beside_the_shards_says_how_many_classes_there_are(tmp_path):
    shard(tmp_path / "a.tar", 0, 2)
    assert opened(tmp_path / "a.tar").num_classes == 3
    (tmp_path / "classes.json").write_text(json.dumps(list("abcdefg")))
    assert opened(tmp_path / "a.tar").num_classes == 7


def test_a_class_beyond_the_list_is_named(tmp_path):
    shard(tmp_path / "a.tar", 0, 2)
    (tmp_path / "classes.json").write_text('["x", "y"]')
    with pytest.raises(ValueError, match=r"a\.tar: a-1 is of class 2, but there are 2 classes"):
        open_tars(str(tmp_path / "a.tar"), "train", 4)


def test_a_class_that_is_in_the_test_split_only_is_named(tmp_path):
    shard(tmp_path / "train.tar", 0, 1)
    shard(tmp_path / "test.tar", 1, 2)
    with pytest.raises(ValueError, match=r"test\.tar: test-1 is of class 2, but there are 2"):
        open_tars(str(tmp_path / "{split}.tar"), "test", 4)


@pytest.mark.parametrize(("text", "error"), [("{", "is not JSON"), ("{}", "must be a list")])
def test_a_list_of_classes_that_is_none_is_refused(tmp_path, text, error):
    shard(tmp_path / "a.tar", 0)
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(ValueError, match=rf"classes\.json {error}"):
        open_tars(str(tmp_path / "a.tar"), "train", 4)


@pytest.mark.parametrize("content", [b"cat", b"-1", b"1.0", b"", b"\xd9\xa1", b"1" * 600, b"1_0"])
def test_a_class_that_is_no_number_is_named(tmp_path, content):
    write(tmp_path / "a.tar", [("k.png", png()), ("k.cls", content)])
    with pytest.raises(ValueError, match=r"a\.tar: k\.cls holds b.*, not a class"):
        index_of(str(tmp_path / "a.tar"))


def test_a_class_may_end_with_a_newline(tmp_path):
    write(tmp_path / "a.tar", [("k.png", png()), ("k.cls", b" 12\n")])
    assert index_of(str(tmp_path / "a.tar")).classes.tolist() == [12]


# Samples


def test_a_sample_without_an_image_is_named(tmp_path):
    write(tmp_path / "a.tar", [*sample("x", 0), ("dir/y.cls", b"1"), ("dir/y.json", b"{}")])
    with pytest.raises(ValueError, match=r"a\.tar: sample dir/y has no image \(\.bmp, "):
        index_of(str(tmp_path / "a.tar"))


def test_a_sample_without_a_class_is_named(tmp_path):
    write(tmp_path / "a.tar", [("x.png", png()), *sample("y", 0)])
    with pytest.raises(ValueError, match=r"a\.tar: sample x has no \.cls"):
        index_of(str(tmp_path / "a.tar"))


@pytest.mark.parametrize(
    ("more", "text"), [(("x.jpg", b"?"), "two images"), (("x.cls", b"1"), r"two \.cls")]
)
def test_a_sample_with_two_of_a_kind_is_named(tmp_path, more, text):
    write(tmp_path / "a.tar", [*sample("x", 0), more])
    with pytest.raises(ValueError, match=rf"a\.tar: sample x has {text}"):
        index_of(str(tmp_path / "a.tar"))


def test_a_tar_without_samples_is_refused(tmp_path):
    write(tmp_path / "a.tar", [])
    with pytest.raises(ValueError, match=r"a\.tar holds no samples"):
        index_of(str(tmp_path / "a.tar"))


def test_keys_end_at_the_first_dot_and_keep_their_folder(tmp_path):
    files = [
        *(("v1.0/" + name, data) for name, data in sample("x", 0)),
        *(("v2.0/" + name, data) for name, data in sample("x", 1)),
        ("v2.0/x.seg.png", b"a map of segments, not the image"),
        (".hidden", b""),
        ("Makefile", b""),
    ]
    write(tmp_path / "a.tar", files)
    index = index_of(str(tmp_path / "a.tar"))
    assert list(index.keys) == ["v1.0/x", "v2.0/x"]
    assert index.classes.tolist() == [0, 1]


def test_pickles_are_not_looked_at(tmp_path):
    bomb = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    write(tmp_path / "a.tar", [*sample("x", 3), ("x.pyd", bomb), ("x.pkl", bomb)])
    assert all_of(opened(tmp_path / "a.tar")) == [(3, 3)]
    assert not (tmp_path / "ran").exists()


def test_a_sample_that_is_no_image_is_bad_and_named(tmp_path):
    write(tmp_path / "a.tar", [*sample("x", 0), ("y.jpg", b"junk"), ("y.cls", b"1")])
    split = opened(tmp_path / "a.tar")
    read = split.samples.read([0, 1])
    split.samples.close()
    assert read.bad == ((f"{tmp_path}/a.tar: y", "not an image"),)
    assert read.targets.tolist() == [0]


# Tars of every dialect

LONG = "a-folder-with-a-name/" * 12 + "key"


@pytest.mark.parametrize(
    ("form", "key"),
    [
        (tarfile.USTAR_FORMAT, "f/" * 60 + "key"),
        (tarfile.GNU_FORMAT, LONG),
        (tarfile.PAX_FORMAT, LONG),
        (tarfile.PAX_FORMAT, "\N{SNOWMAN}" * 60),
        (tarfile.GNU_FORMAT, "\N{SNOWMAN}" * 60),
    ],
    ids=["prefix", "GNU", "pax", "pax UTF-8", "GNU UTF-8"],
)
def test_long_names_are_read(tmp_path, form, key):
    write(tmp_path / "a.tar", [*sample(key, 1), *sample("short", 2)], form)
    assert list(index_of(str(tmp_path / "a.tar")).keys) == [key, "short"]
    assert all_of(opened(tmp_path / "a.tar")) == [(1, 1), (2, 2)]


@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_tars_that_the_tar_command_writes_are_read(tmp_path, form):
    if shutil.which("tar") is None:
        pytest.skip("no tar command")
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for number in range(3):
        for name, data in sample(f"in/deep/{number}", number):
            (tmp_path / name).write_bytes(data)
    (tmp_path / "in" / "deep" / "9.png").symlink_to("0.png")  # no sample: it has no content here
    os.remove(tmp_path / "in" / "deep" / "9.png")
    command = ["tar", f"--format={form}", "--sort=name", "-cf", "a.tar", "in"]
    subprocess.run(command, cwd=tmp_path, check=True)
    index = index_of(str(tmp_path / "a.tar"))
    assert list(index.keys) == [f"in/deep/{number}" for number in range(3)]
    assert all_of(opened(tmp_path / "a.tar")) == [(0, 0), (1, 1), (2, 2)]


def test_the_scan_sees_what_tarfile_sees(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, size in (
            ("folder", tarfile.DIRTYPE, 0),
            ("folder/file", tarfile.REGTYPE, 1000),
            ("link", tarfile.SYMTYPE, 0),
            ("hard", tarfile.LNKTYPE, 0),
            ("pipe", tarfile.FIFOTYPE, 0),
            ("x" * 200, tarfile.REGTYPE, 0),
            ("last", tarfile.REGTYPE, 513),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, size, "folder/file"
            info.pax_headers = {"comment": "nothing of use"}
            tar.addfile(info, io.BytesIO(bytes(size)))
    path = tmp_path / "a.tar"
    with tarfile.open(path) as tar:
        wanted = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    assert [m[:3] for m in members(str(path), path.stat().st_size)] == wanted
    assert len(wanted) == 3


def test_sizes_of_more_than_8_gib_are_understood(tmp_path):
    info = tarfile.TarInfo("huge.bin")
    info.size = 9 * 2**30
    path = tmp_path / "a.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(ValueError, match=r"huge\.bin at byte 0 ends at byte 9663676928"):
        list(members(str(path), 512))


def test_an_image_of_more_than_256_mib_is_refused(tmp_path):
    info = tarfile.TarInfo("k.png")
    info.size = 257 * 2**20
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(info.tobuf())
        file.truncate(512 + info.size + 1024)
    with pytest.raises(ValueError, match=r"a\.tar: k\.png is larger than 256 MiB"):
        index_of(str(path))


# Damaged tars


def test_a_tar_that_is_cut_short_is_refused_wherever_it_is_cut(tmp_path):
    whole = shard(tmp_path / "a.tar", 0, 1, 2).read_bytes()
    end = len(whole.rstrip(b"\0"))
    end += -end % 512  # where the end mark begins
    for length in (*range(1, end, 97), end - 512, end):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.tar is (cut short|damaged at byte)"):
            index_of(str(tmp_path / "cut.tar"))


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "a.tar").touch()
    with pytest.raises(ValueError, match=r"a\.tar is cut short: its end mark is missing"):
        index_of(str(tmp_path / "a.tar"))


def test_a_damaged_header_is_refused_with_its_place(tmp_path):
    path = shard(tmp_path / "a.tar", 0, 1)
    data = bytearray(path.read_bytes())
    second = 512 + 512  # the first image is below 512 bytes
    data[second + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"a\.tar is damaged at byte {second}: not a tar header"):
        index_of(str(path))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_of_any_kind_is_an_error_of_ours_or_does_no_harm(tmp_path, data):
    path = tmp_path / "a.tar"
    write(path, [*sample("x" * 120, 1), *sample("y", 2)], data.draw(st.sampled_from([1, 2])))
    broken = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(broken) - 1))
        broken[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
    path.write_bytes(broken)
    tars._index_of.cache_clear()
    with contextlib.suppress(ValueError):
        index = index_of(str(path))
        files = TarFiles([index])
        for number in range(len(files)):
            assert len(files.load(number)) == index.sizes[number]
        files.close()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}


@pytest.mark.parametrize("kind", PACKERS)
@pytest.mark.parametrize("suffix", ["", "."])
def test_a_compressed_tar_is_refused_with_what_to_do(tmp_path, kind, suffix):
    packed = PACKERS[kind](shard(tmp_path / "a.tar", 0).read_bytes())
    name = f"b.tar.{kind}" if suffix else "b.tar"
    (tmp_path / name).write_bytes(packed)
    with pytest.raises(ValueError, match=rf"{name} is .*unpack it first"):
        open_tars(str(tmp_path / name), "train", 4)


def test_sparse_members_are_refused(tmp_path):
    info = tarfile.TarInfo("k.png")
    info.type = tarfile.GNUTYPE_SPARSE
    path = tmp_path / "a.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(ValueError, match=r"k\.png at byte 0 is sparse"):
        index_of(str(path))


# Files and processes


def test_a_tar_is_gone_through_once_unless_it_has_changed(tmp_path):
    path = shard(tmp_path / "a.tar", 0, 1)
    first = index_of(str(path))
    assert index_of(str(path)) is first
    shard(path, 0, 1, 2)
    assert len(index_of(str(path)).keys) == 3


def test_a_tar_that_becomes_shorter_gives_bad_samples(tmp_path):
    path = shard(tmp_path / "a.tar", 0, 1)
    split = opened(path)
    os.truncate(path, 1200)
    read = split.samples.read([0, 1])
    split.samples.close()
    assert read.num_good == 1
    assert read.bad == ((f"{path}: a-1", "the tar has become shorter since the start"),)


def test_only_so_many_tars_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "MAX_OPEN", 2)
    for number in range(5):
        shard(tmp_path / f"{number}.tar", number)
    files = TarFiles([index_of(str(tmp_path / f"{number}.tar")) for number in range(5)])
    for number in (0, 1, 2, 3, 4, 0, 1):
        assert files.load(number) == png((number,) * 3)
        assert len(files._open) <= 2
    files.close()
    files.close()
    assert files.load(1)  # and it may be read again
    files.close()


def test_digests_tell_content_apart_but_not_where_the_shards_are(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shard(tmp_path / name / "a.tar", 0, 1)
    digest = opened(tmp_path / "one" / "*.tar").digest
    assert opened(tmp_path / "two" / "*.tar").digest == digest
    shard(tmp_path / "two" / "a.tar", 1, 1)
    assert opened(tmp_path / "two" / "*.tar").digest != digest


def test_the_size_is_that_of_the_first_training_image(tmp_path):
    write(tmp_path / "train.tar", [("k.png", png(size=(30, 20))), ("k.cls", b"0")])
    shard(tmp_path / "test.tar", 0)
    pattern = tmp_path / "{split}.tar"
    assert opened(pattern, image_size=0).input_shape == (3, 20, 20)
    assert opened(pattern, "test", image_size=0).input_shape == (3, 20, 20)


def test_cifar10_is_complete_and_balanced(test_data):
    pattern = str(test_data / "cifar10" / "{split}-*.tar")
    train, test = opened(pattern, image_size=0), opened(pattern, "test", image_size=0)
    assert (len(train), len(test)) == (50_000, 10_000)
    assert train.num_classes == test.num_classes == 10
    assert train.input_shape == test.input_shape == (3, 32, 32)
    read = test.samples.read(range(0, 10_000, 10))
    test.samples.close()
    assert read.bad == ()
    mean = read.inputs.float().mean((0, 2, 3)) / 255
    assert [round(float(m), 2) for m in mean] == pytest.approx([0.49, 0.48, 0.45], abs=0.015)
