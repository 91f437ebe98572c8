import io

import numpy as np
import pytest
from PIL import Image

from distbelief.workers import view
from distbelief.workers.pixels import Pictures, decode
from distbelief.workers.view import AREA, ASPECT, GREY, RECIPES, View, draw, draw_box, middle, show

DRAWS = 100_000


def ramp(width, height):
    """Each pixel says where it is: R the column, G the row."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))


def file_of(image, form="PNG"):
    data = io.BytesIO()
    image.save(data, form)
    return data.getvalue()


@pytest.fixture(scope="module")
def boxes():
    random = np.random.default_rng(1)
    return np.array([draw_box(500, 400, random) for _ in range(DRAWS)])


def test_crops_of_the_paper_lie_inside_and_have_its_areas_and_aspects(boxes):
    left, top, right, bottom = boxes.T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right <= 500).all()
    assert (bottom <= 400).all()
    across, down = right - left, bottom - top
    area, aspect = across * down / (500 * 400), across / down
    assert area.min() > AREA[0] - 0.002
    assert area.max() <= 1
    assert aspect.min() > ASPECT[0] * 0.98
    assert aspect.max() < ASPECT[1] * 1.02


def test_areas_and_aspects_of_crops_are_spread_evenly_where_all_of_them_fit(boxes):
    across, down = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, aspect = across * down / (500 * 400), across / down
    # Every aspect of up to 60 % of the area fits into 5:4: there nothing is drawn again.
    small = area < 0.6
    shares, _ = np.histogram(area[small], 8, (0.08, 0.6))
    assert shares / shares.mean() == pytest.approx(np.ones(8), abs=0.05)
    shares, _ = np.histogram(np.log(aspect[small]), 8, (np.log(ASPECT[0]), np.log(ASPECT[1])))
    assert shares / shares.mean() == pytest.approx(np.ones(8), abs=0.05)
    assert np.log(aspect[small]).mean() == pytest.approx(0, abs=0.005)
    assert area.mean() > 0.45  # the large ones are drawn too, if more seldom


def test_crops_cover_the_image_alike_to_both_sides_and_its_middle_most(boxes):
    covered = np.zeros((40, 50))
    for left, top, right, bottom in boxes[:20_000] / 10:
        covered[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] += 1
    covered /= covered.max()
    assert covered == pytest.approx(covered[:, ::-1], abs=0.03)
    assert covered == pytest.approx(covered[::-1], abs=0.03)
    assert covered[20, 25] > 0.95
    assert 0.01 < covered[0, 0] < 0.3


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((1000, 10), (493.33, 0, 506.67, 10)),
        ((10, 1000), (0, 493.33, 10, 506.67)),
    ],
)
def test_of_an_image_that_no_crop_fits_into_the_largest_in_its_middle_is_taken(size, box):
    random = np.random.default_rng(0)
    width, height = size
    found = [draw_box(width, height, random) for _ in range(50)]
    assert any(one == pytest.approx(box, abs=0.01) for one in found)
    for left, top, right, bottom in found:
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        assert ASPECT[0] - 0.2 < (right - left) / (bottom - top) < ASPECT[1] + 0.2


def test_the_paper_mirrors_half_and_draws_each_interpolation_and_each_order_alike():
    random = np.random.default_rng(2)
    views = [draw("paper", 320, 240, 224, random) for _ in range(6_000)]
    assert np.mean([v.is_mirrored for v in views]) == pytest.approx(0.5, abs=0.03)
    for one in view._RESAMPLING:
        assert np.mean([v.resampling == one for v in views]) == pytest.approx(1 / 4, abs=0.03)
    orders = {tuple(which for which, _ in v.factors) for v in views}
    assert len(orders) == 6
    factors = np.array([factor for v in views for _, factor in v.factors])
    assert factors.min() >= 0.5
    assert factors.max() <= 1.5
    assert factors.mean() == pytest.approx(1.0, abs=0.01)
    lighting = np.array([v.lighting for v in views])
    assert lighting.mean(0) == pytest.approx(np.zeros(3), abs=0.3)
    # The first component, all three channels alike, is much the largest.
    assert np.corrcoef(lighting.T)[0, 1] > 0.8


def test_caffe_takes_224_of_256_of_the_warped_image():
    random = np.random.default_rng(3)
    views = [draw("caffe", 512, 256, 224, random) for _ in range(3_000)]
    boxes = np.array([v.box for v in views])
    assert (boxes[:, 2] - boxes[:, 0] == 448).all()
    assert (boxes[:, 3] - boxes[:, 1] == 224).all()
    assert sorted(set(boxes[:, 1])) == list(range(33))
    assert np.mean([v.is_mirrored for v in views]) == pytest.approx(0.5, abs=0.04)


def test_small_moves_by_an_eighth_over_grey():
    random = np.random.default_rng(4)
    views = [draw("small", 32, 32, 32, random) for _ in range(3_000)]
    assert {v.shift[0] for v in views} == {v.shift[1] for v in views} == set(range(-4, 5))
    shown = np.array(show(ramp(32, 32), View(box=(0, 0, 32, 32), shift=(3, -2)), 32, (1, 1)))
    assert (shown[:, :3] == GREY).all()
    assert (shown[-2:] == GREY).all()
    assert shown[0, 3].tolist() == [0, 2, 0]
    assert shown[29, 31].tolist() == [28, 31, 0]


def test_a_view_is_the_box_made_square_mirrored_or_not():
    image = ramp(60, 40)
    box = (10, 20, 26, 36)
    plain = np.array(show(image, View(box=box), 16, (1, 1)))
    assert (plain == np.array(image)[20:36, 10:26]).all()
    mirrored = np.array(show(image, View(box=box, is_mirrored=True), 16, (1, 1)))
    assert (mirrored == plain[:, ::-1]).all()
    # Of an image that was decoded at half its size the same part is taken.
    half = np.array(show(image.resize((30, 20)), View(box=box), 8, (0.5, 0.5)))
    assert half == pytest.approx(plain.reshape(8, 2, 8, 2, 3).mean((1, 3)), abs=1.5)


def test_brightness_contrast_and_colour_have_their_usual_meaning():
    image = ramp(16, 16)
    pixels = np.array(image).astype(float)
    bright = np.array(show(image, View(box=(0, 0, 16, 16), factors=((0, 1.5),)), 16, (1, 1)))
    assert bright == pytest.approx(pixels * 1.5, abs=1)
    grey = np.array(show(image, View(box=(0, 0, 16, 16), factors=((2, 0.0),)), 16, (1, 1)))
    assert (grey == grey[..., :1]).all()
    flat = np.array(show(image, View(box=(0, 0, 16, 16), factors=((1, 0.0),)), 16, (1, 1)))
    assert len(np.unique(flat)) == 1
    lit = np.array(show(image, View(box=(0, 0, 16, 16), lighting=(10.0, -3.0, 0.0)), 16, (1, 1)))
    assert lit == pytest.approx(np.clip(pixels + np.array([10, -3, 0]), 0, 255), abs=0)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("size", [(500, 375), (31, 200), (1600, 1201)])
def test_every_recipe_shows_every_image(recipe, form, size):
    data = file_of(Image.new("L", size, 90), form)
    for seed in range(3):
        pixels = decode(data, 48, "one", recipe, np.random.default_rng(seed))
        assert pixels.shape == (3, 48, 48)
        assert pixels.dtype.is_floating_point is False


def test_a_photograph_decoded_small_shows_what_the_whole_one_does(monkeypatch):
    x, y = np.meshgrid(np.arange(1200), np.arange(900))
    waves = 128 + 60 * np.sin(x / 90) + 60 * np.cos(y / 70)
    data = file_of(Image.fromarray(waves.astype(np.uint8)).convert("RGB"), "JPEG")
    small = decode(data, 64, "one", "caffe", np.random.default_rng(5)).float()
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", lambda *_: None)
    whole = decode(data, 64, "one", "caffe", np.random.default_rng(5)).float()
    assert (small - whole).abs().mean() < 1.5


def test_views_follow_seed_epoch_and_sample_alone(tmp_path):
    class Files:
        def __len__(self):
            return 2

        def name(self, index):
            return str(index)

        def load(self, index):
            return file_of(ramp(80, 60))

        def close(self):
            pass

    def views(seed, epoch, indices=(0, 1)):
        return Pictures(Files(), [0, 1], 16, "paper", seed).read(indices, epoch).inputs

    assert views(1, 0).equal(views(1, 0))
    assert views(1, 0)[1].equal(views(1, 0, (1,))[0])
    assert not views(1, 0)[0].equal(views(1, 0)[1])
    assert not views(1, 0).equal(views(1, 1))
    assert not views(1, 0).equal(views(2, 0))


def test_an_unknown_recipe_is_named():
    with pytest.raises(ValueError, match="'fancy' is none of middle, paper, caffe, small"):
        draw("fancy", 10, 10, 8, np.random.default_rng(0))


def test_the_middle_is_the_largest_square():
    assert middle(50, 20) == (15, 0, 35, 20)
