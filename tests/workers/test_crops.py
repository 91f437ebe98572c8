import numpy as np
import pytest
import torch
from PIL import Image

from distbelief.workers.crops import plan, take

SIZE = 224


def ramp(width, height):
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([columns % 256, rows % 256, columns // 256], -1).astype("u1"))


def test_the_144_crops_of_a_wide_image_lie_where_the_paper_says():
    scaled = plan(144, 512, 256, SIZE)
    assert [(s.width, s.height) for s in scaled] == [
        (512, 256),
        (576, 288),
        (640, 320),
        (704, 352),
    ]
    first = scaled[0]
    assert [(q.left, q.top, q.side) for q in first.squares] == [
        (0, 0, 256),
        (128, 0, 256),
        (256, 0, 256),
    ]
    assert first.squares[0].crops == ((0, 0), (32, 0), (0, 32), (32, 32), (16, 16))
    assert scaled[3].squares[2].crops == ((0, 0), (128, 0), (0, 128), (128, 128), (64, 64))
    num = sum(len(q.crops) + q.has_whole for s in scaled for q in s.squares)
    assert 2 * num == 144


def test_squares_of_an_upright_image_are_upper_middle_and_lower():
    squares = plan(144, 300, 450, SIZE)[1].squares  # the shorter side is 288: 288 x 432
    assert [(q.left, q.top, q.side) for q in squares] == [(0, 0, 288), (0, 72, 288), (0, 144, 288)]


def test_of_a_square_image_the_three_squares_are_one():
    squares = plan(144, 100, 100, SIZE)[0].squares
    assert len(set(squares)) == 1
    assert len(squares) == 3


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (100, 99), (1000, 50)])
@pytest.mark.parametrize("side", [224, 64, 33])
def test_all_crops_lie_inside(size, side):
    width, height = size
    for scaled in plan(144, width, height, side):
        assert min(scaled.width, scaled.height) == scaled.squares[0].side
        for square in scaled.squares:
            assert 0 <= square.left <= scaled.width - square.side
            assert 0 <= square.top <= scaled.height - square.side
            for left, top in square.crops:
                assert 0 <= left <= square.side - side
                assert 0 <= top <= square.side - side


def test_crops_hold_the_pixels_of_their_places():
    image = ramp(512, 256)  # as large as the smallest scale: nothing is resampled there
    crops = take(image, 144, SIZE)
    assert crops.shape == (144, 3, SIZE, SIZE)
    assert crops.dtype == torch.uint8
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert crops[0].equal(pixels[:, :224, :224])  # upper left of the left square
    assert crops[1].equal(crops[0].flip(-1))
    assert crops[6].equal(pixels[:, 32:, 32:256])  # lower right
    assert crops[8].equal(pixels[:, 16:240, 16:240])  # its middle
    whole = Image.fromarray(np.array(image)[:, :256]).resize((224, 224), Image.Resampling.BILINEAR)
    assert crops[10].equal(torch.from_numpy(np.array(whole)).permute(2, 0, 1))
    assert crops[12].equal(pixels[:, :224, 128:352])  # the middle square's
    assert crops[24].equal(pixels[:, :224, 256:480])  # the right square's


def test_ten_crops_are_of_the_middle_square_and_one_is_its_middle():
    image = ramp(512, 256)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    ten, one = take(image, 10, SIZE), take(image, 1, SIZE)
    assert ten.shape[0] == 10
    assert one.shape[0] == 1
    assert ten[0].equal(pixels[:, :224, 128:352])
    assert ten[8].equal(one[0])
    assert one[0].equal(pixels[:, 16:240, 144:368])
    assert all(ten[i + 1].equal(ten[i].flip(-1)) for i in range(0, 10, 2))


def test_another_number_is_refused():
    with pytest.raises(ValueError, match="7 crops: there are 1, 10, 144"):
        plan(7, 100, 100, SIZE)
