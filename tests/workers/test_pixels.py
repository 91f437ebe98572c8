"""Pixels: every kind of image becomes RGB of one size; what is no image is named."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from distbelief.workers import pixels
from distbelief.workers.pixels import BadSample, Pictures, decode, normalise, size_of

RED = (200, 30, 40)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def flat(mode: str, colour, size=(12, 8)) -> Image.Image:
    return Image.new(mode, size, colour)


KINDS = {
    "png": (encoded(flat("RGB", RED)), RED),
    "bmp": (encoded(flat("RGB", RED), "BMP"), RED),
    "ppm": (encoded(flat("RGB", RED), "PPM"), RED),
    "webp": (encoded(flat("RGB", RED), "WEBP", lossless=True), RED),
    "tiff": (encoded(flat("RGB", RED), "TIFF"), RED),
    "grey": (encoded(flat("L", 77)), (77, 77, 77)),
    "grey with alpha": (encoded(flat("LA", (77, 0))), (77, 77, 77)),
    "transparent": (encoded(flat("RGBA", (*RED, 0))), RED),
    "palette": (encoded(flat("RGB", RED).quantize(4)), RED),
    "gif": (encoded(flat("RGB", RED).quantize(4), "GIF"), RED),
    "bits": (encoded(flat("1", 1)), (255, 255, 255)),
    "16 bits": (encoded(flat("I;16", 128 * 257)), (128, 128, 128)),
    "cmyk": (encoded(flat("CMYK", (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
}


@pytest.mark.parametrize(("data", "colour"), KINDS.values(), ids=KINDS)
def test_every_kind_of_image_becomes_rgb(data, colour):
    image = decode(data, 8, "x")
    assert image.shape == (3, 8, 8)
    assert image.dtype == torch.uint8
    assert image.amin((1, 2)).tolist() == image.amax((1, 2)).tolist() == list(colour)


def test_a_palette_with_transparency_makes_no_noise():
    image = flat("P", 1)
    image.putpalette([0, 0, 0, *RED])
    decoded = decode(encoded(image, transparency=b"\0\x80"), 8, "x")
    assert decoded[:, 0, 0].tolist() == list(RED)


def test_the_middle_of_the_longer_side_is_kept():
    columns = np.zeros((10, 30, 3), np.uint8)
    columns[:, 10:20] = 255  # the middle third is white
    assert decode(encoded(Image.fromarray(columns)), 10, "x").min() == 255
    assert decode(encoded(Image.fromarray(columns.transpose(1, 0, 2))), 10, "x").min() == 255


def test_the_shorter_side_is_resized_bilinearly():
    ramp = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None], 64, 0)
    small = decode(encoded(Image.fromarray(ramp)), 16, "x")
    wanted = torch.from_numpy(ramp.reshape(16, 4, 16, 4).mean((1, 3)))
    assert float((small[0].float() - wanted).abs().max()) < 3


def test_a_photograph_at_a_part_of_its_size_is_nearly_what_the_whole_would_give():
    generator = np.random.default_rng(0)
    rough = Image.fromarray(generator.integers(0, 255, (12, 12, 3), dtype=np.uint8))
    photo = encoded(rough.resize((640, 640), Image.Resampling.BICUBIC), "JPEG", quality=95)
    whole = Image.open(io.BytesIO(photo)).convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)
    difference = decode(photo, 64, "x").permute(1, 2, 0).float() - torch.from_numpy(np.array(whole))
    assert float(difference.abs().mean()) < 1.5


def test_orientation_tags_are_not_followed():
    image = Image.new("RGB", (16, 8), RED)
    image.paste((0, 0, 0), (0, 0, 4, 8))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    plain, turned = encoded(image, "PNG"), encoded(image, "PNG", exif=exif)
    assert decode(plain, 8, "x").equal(decode(turned, 8, "x"))


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it is so large, in 100 bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


JPEG = encoded(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "not an image"),
        (b"not an image at all", "not an image"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (JPEG[:30], "Error|not an image"),
        (encoded(flat("RGB", RED))[:45], "Error|not an image"),
        (bomb(9_500, 9_500), "more than 89,478,485 pixels"),
        (bomb(200_000, 200_000), "more than 89,478,485 pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (encoded(flat("F", 0.5), "TIFF"), "floating-point"),
    ],
    ids=["empty", "text", "half", "head", "png head", "bomb", "huge bomb", "postscript", "float"],
)
def test_what_cannot_be_read_is_named_with_the_reason(data, text):
    with pytest.raises(BadSample, match=text) as caught:
        decode(data, 8, "a/b.jpg")
    assert caught.value.name == "a/b.jpg"
    assert str(caught.value).startswith("a/b.jpg: ")


@pytest.mark.parametrize("size", [(9_500, 9_500), (200_000, 200_000)])
def test_bombs_are_refused_also_where_pillow_was_told_to_take_them(monkeypatch, size):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(BadSample, match="more than 89,478,485 pixels"):
        decode(bomb(*size), 8, "x")


def test_flipped_bytes_give_an_image_or_a_bad_sample_and_nothing_else():
    generator = np.random.default_rng(1)
    for form in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        data = encoded(Image.effect_noise((20, 20), 90).convert("RGB"), form)
        for _ in range(60):
            broken = bytearray(data)
            for at in generator.integers(0, len(data), 4):
                broken[at] = generator.integers(0, 256)
            with contextlib.suppress(BadSample):
                assert decode(bytes(broken), 8, "x").shape == (3, 8, 8)


def test_normalised_pixels_have_the_mean_and_deviation_of_imagenet():
    batch = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    batch[1] = 0
    normal = normalise(batch)
    assert normal.dtype == torch.float32
    wanted = (torch.tensor([1.0, 0.0])[:, None] - torch.tensor([0.485, 0.456, 0.406])) / (
        torch.tensor([0.229, 0.224, 0.225])
    )
    torch.testing.assert_close(normal[:, :, 0, 0], wanted)
    assert batch[0, 0, 0, 0] == 255  # the pixels are left as they were


class Listed:
    """Files in a list."""

    def __init__(self, *contents: bytes) -> None:
        self.contents = contents

    def __len__(self) -> int:
        return len(self.contents)

    def name(self, index: int) -> str:
        return f"file{index}"

    def load(self, index: int) -> bytes:
        if not self.contents[index]:
            raise BadSample(self.name(index), "gone")
        return self.contents[index]

    def close(self) -> None:
        pass


GOOD = encoded(flat("RGB", RED))


def test_bad_samples_are_left_out_of_their_batch_and_named():
    read = Pictures(Listed(GOOD, b"", GOOD, b"junk", GOOD), [3, 1, 4, 1, 5], 8).read([4, 3, 2, 1])
    assert read.inputs.shape == (2, 3, 8, 8)
    assert read.targets.tolist() == [5, 4]
    assert read.num_good == 2
    assert read.bad == (("file3", "not an image"), ("file1", "gone"))


def test_a_batch_of_bad_samples_alone_has_no_tensors():
    read = Pictures(Listed(b"x", b"y"), [0, 0], 8).read([0, 1])
    assert (read.inputs, read.targets, read.num_good, len(read.bad)) == (None, None, 0, 2)


def test_the_size_is_the_shorter_side_of_the_first_image_but_at_most_224():
    assert size_of(Listed(b"", b"junk", encoded(flat("RGB", RED, (40, 30))), GOOD)) == 30
    assert size_of(Listed(encoded(flat("RGB", RED, (500, 300))))) == 224


def test_no_size_without_an_image():
    with pytest.raises(ValueError, match="none of the first 100 images can be read; file0: gone"):
        size_of(Listed(b"", b"junk"))


def test_the_line_for_bombs_is_pillows():
    assert pixels.MAX_PIXELS == Image.MAX_IMAGE_PIXELS


def test_real_photographs_of_all_kinds_are_read(test_data):
    paths = sorted((test_data / "imagenet-photos").glob("*/*.JPEG"))
    assert len(paths) == 100
    batch = torch.stack([decode(path.read_bytes(), 64, path.name) for path in paths])
    mean = normalise(batch).mean((0, 2, 3))
    assert float(mean.abs().max()) < 0.3
