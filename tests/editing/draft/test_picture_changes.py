"""Pictures without what an answer is about: which pixels change, and which do not."""

import numpy as np
import pytest
from PIL import Image

from vapr.editing.draft.picture_changes import blurred, changed_share, cropped, masked
from vapr.editing.rules.boxes import Box

BOX = Box(8, 4, 24, 12)


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8))


def inside(box: Box, picture: Image.Image) -> np.ndarray:
    where = np.zeros((picture.height, picture.width), bool)
    where[box.top : box.bottom, box.left : box.right] = True
    return where


def test_a_masked_box_has_the_mean_colour_and_all_else_stays(picture):
    new, share = masked(picture, [BOX])
    before, after, where = np.asarray(picture), np.asarray(new), inside(BOX, picture)
    assert (after[where] == np.round(before.mean(axis=(0, 1)))).all()
    assert (after[~where] == before[~where]).all()
    assert share == pytest.approx(16 * 8 / 1200, abs=0.001)


def test_a_blurred_box_loses_its_detail_and_all_else_stays(picture):
    new, share = blurred(picture, [BOX, Box(30, 20, 40, 30)])
    before, after = np.asarray(picture, float), np.asarray(new, float)
    where = inside(BOX, picture)
    assert after[where].std() < before[where].std() / 4
    rest = ~where & ~inside(Box(30, 20, 40, 30), picture)
    assert (after[rest] == before[rest]).all()
    assert 0.15 < share <= 228 / 1200


def test_a_crop_is_the_largest_part_beside_the_boxes(picture):
    new, share = cropped(picture, [BOX, Box(10, 10, 12, 14)])
    assert share == pytest.approx(1 - 16 / 30)  # below both boxes: 40 x 16 of 40 x 30 pixels
    assert abs(new.width * new.height - 1200) < 60 and new.width / new.height == pytest.approx(40 / 16, rel=0.05)
    part = picture.crop((0, 14, 40, 30)).resize(new.size, Image.Resampling.BICUBIC)
    assert changed_share(new, part) == 0


def test_no_part_is_left_beside_a_box_from_edge_to_edge(picture):
    assert cropped(picture, [Box(0, 0, 40, 30)]) is None
    assert cropped(picture, [Box(0, 5, 40, 6), Box(3, 0, 4, 30)]) is None
