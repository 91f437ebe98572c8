"""Folders of images: which are the classes, which the splits, and what is missing."""

import io
import os
from pathlib import Path

import pytest
from PIL import Image

from distbelief.workers.folder import open_folder
from distbelief.workers.split import Split

COLOURS = {"cat": (200, 0, 0), "dog": (0, 200, 0), "eel": (0, 0, 200)}


def picture(path: Path, colour=(9, 9, 9), size=(10, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    path.write_bytes(file.getvalue())


def animals(root: Path, classes="cat dog eel", each=2) -> Path:
    for name in classes.split():
        for number in range(each):
            picture(root / name / f"{number}.png", COLOURS.get(name, (5, 5, 5)))
    return root


def opened(path: Path, split: str = "train", image_size: int = 4) -> Split:
    found = open_folder(path, split, image_size)
    assert found is not None
    return found


def colours(split: Split) -> list[tuple[list[int], int]]:
    read = split.samples.read(range(len(split)))
    assert read.bad == ()
    return [(x[:, 0, 0].tolist(), int(y)) for x, y in zip(read.inputs, read.targets, strict=True)]


def test_folders_are_classes_in_the_order_of_their_names(tmp_path):
    split = opened(animals(tmp_path, "eel cat dog"))
    assert (len(split), split.num_classes, split.input_shape) == (6, 3, (3, 4, 4))
    assert split.is_decoding
    assert not split.is_ordered
    wanted = [(list(COLOURS[name]), target) for target, name in enumerate(("cat", "dog", "eel"))]
    assert colours(split) == [one for one in wanted for _ in range(2)]


def test_without_a_train_folder_there_is_no_test_split(tmp_path):
    assert open_folder(animals(tmp_path), "test", 4) is None


@pytest.mark.parametrize("name", ["test", "val"])
def test_a_train_folder_holds_the_training_split_and_test_or_val_the_other(tmp_path, name):
    animals(tmp_path / "train")
    animals(tmp_path / name, "dog", each=1)
    assert len(opened(tmp_path)) == 6
    test = opened(tmp_path, "test")
    assert (len(test), test.num_classes, test.name) == (1, 3, "test")
    assert colours(test) == [([0, 200, 0], 1)]  # numbered as in training


def test_test_goes_before_val(tmp_path):
    for name, each in (("train", 2), ("val", 5), ("test", 1)):
        animals(tmp_path / name, each=each)
    assert len(opened(tmp_path, "test")) == 3


def test_a_train_folder_alone_has_no_test_split(tmp_path):
    animals(tmp_path / "train")
    assert open_folder(tmp_path, "test", 4) is None


def test_pictures_of_trains_are_a_class(tmp_path):
    split = opened(animals(tmp_path, "bus car train"))
    assert (len(split), split.num_classes) == (6, 3)


def test_what_is_hidden_or_no_image_by_its_name_is_not_looked_at(tmp_path):
    animals(tmp_path, "cat")
    for name in ("cat/.0.png.swp", "cat/.hidden.png", "cat/notes.txt", "cat/png", "README.md"):
        (tmp_path / name).write_text("no image")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    split = opened(tmp_path)
    assert (len(split), split.num_classes) == (2, 1)


@pytest.mark.parametrize(
    "extension", ["JPG", "jpeg", "PnG", "webp", "bmp", "ppm", "gif", "tif", "TIFF"]
)
def test_an_extension_may_be_in_capitals(tmp_path, extension):
    picture(tmp_path / "cat" / f"a.b.{extension}")
    assert len(opened(tmp_path)) == 1


def test_images_may_lie_deeper_and_behind_links(tmp_path):
    picture(tmp_path / "cat" / "2019" / "june" / "a.png")
    picture(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "cat" / "2020").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "cat" / "circle").symlink_to(tmp_path / "cat")
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "cat")
    assert len(opened(tmp_path / "data")) == 2


def test_names_that_are_no_text_are_files_too(tmp_path):
    picture(tmp_path / "caf\udce9" / "\udcff.png")
    assert colours(opened(tmp_path)) == [([9, 9, 9], 0)]


def test_the_size_is_that_of_the_first_training_image(tmp_path):
    animals(tmp_path / "train")
    picture(tmp_path / "train" / "cat" / "0.png", size=(30, 20))
    picture(tmp_path / "test" / "cat" / "0.png", size=(50, 50))
    assert opened(tmp_path, image_size=0).input_shape == (3, 20, 20)
    assert opened(tmp_path, "test", image_size=0).input_shape == (3, 20, 20)


def test_a_file_that_is_gone_when_it_is_read_is_a_bad_sample(tmp_path):
    split = opened(animals(tmp_path, "cat", each=3))
    (tmp_path / "cat" / "1.png").unlink()
    read = split.samples.read([0, 1, 2])
    assert (read.num_good, len(read.inputs)) == (2, 2)
    assert read.bad == ((f"{tmp_path}/cat/1.png", "No such file or directory"),)


def test_a_file_that_is_too_large_is_a_bad_sample(tmp_path):
    split = opened(animals(tmp_path, "cat"))
    with (tmp_path / "cat" / "0.png").open("r+b") as file:
        file.truncate(256 * 2**20 + 1)
    assert split.samples.read([0]).bad == ((f"{tmp_path}/cat/0.png", "larger than 256 MiB"),)


def test_what_is_no_file_is_a_bad_sample_and_nobody_waits_for_it(tmp_path):
    animals(tmp_path, "cat")
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    (tmp_path / "cat" / "zero.png").symlink_to("/dev/zero")
    read = opened(tmp_path).samples.read(range(4))
    assert len(read.targets) == 2
    assert read.bad == tuple(
        (f"{tmp_path}/cat/{name}.png", "not a file") for name in ("pipe", "zero")
    )


def test_digests_tell_names_and_classes_apart_but_not_where_the_folder_is(tmp_path):
    digest = opened(animals(tmp_path / "one")).digest
    assert opened(animals(tmp_path / "two")).digest == digest
    picture(tmp_path / "two" / "cat" / "more.png")
    assert opened(tmp_path / "two").digest != digest


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/no does not exist: .* every machine"):
        open_folder(tmp_path / "no", "train", 0)
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/file is not a folder"):
        open_folder(tmp_path / "file", "train", 0)


def test_a_folder_without_classes_is_refused(tmp_path):
    picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match=f"{tmp_path} holds no folders: .*/CLASS/IMAGE"):
        open_folder(tmp_path, "train", 0)


def test_a_class_without_images_is_named(tmp_path):
    animals(tmp_path, "cat")
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "a.heic").touch()
    with pytest.raises(ValueError, match=rf"{tmp_path}/dog holds no images \(\.bmp, "):
        open_folder(tmp_path, "train", 0)


def test_a_test_split_without_images_is_refused(tmp_path):
    animals(tmp_path / "train")
    (tmp_path / "test" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"the folders of {tmp_path}/test hold no images"):
        open_folder(tmp_path, "test", 0)


def test_a_class_that_is_in_the_test_split_only_is_named(tmp_path):
    animals(tmp_path / "train")
    animals(tmp_path / "test", "dog fox")
    with pytest.raises(ValueError, match=f"class 'fox' is in {tmp_path}/test, but not in"):
        open_folder(tmp_path, "test", 0)


def test_images_none_of_which_can_be_read_are_refused(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.jpg").write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"can be read; .*cat/a\.jpg: not an image"):
        open_folder(tmp_path, "train", 0)


def test_the_real_photographs(test_data):
    split = opened(test_data / "imagenet-photos", image_size=0)
    assert (len(split), split.num_classes, split.input_shape) == (100, 100, (3, 224, 224))
    read = split.samples.read([0, 57, 99])
    assert read.targets.tolist() == [0, 57, 99]
    assert read.inputs.shape == (3, 3, 224, 224)
