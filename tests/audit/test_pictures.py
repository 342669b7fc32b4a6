"""The audit of pairs with rejected_images: what changed, by kind, and what a rejected picture gives away by itself."""

import json

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tests.audit.pair_sets import audited, gates
from tests.audit.test_audit_command import vapr, written
from vapr.audit import pictures
from vapr.audit.pictures import changed_share, picture_features

NAMES = list(pictures.FEATURES)
SAME = {"prompt": "What is it?", "chosen": "A thing.", "rejected": "A thing."}


def picture(n: int) -> Image.Image:
    """Coarse noise of a brightness of its own, with nothing flat in it."""
    random = np.random.default_rng(n)
    coarse = np.kron(random.integers(40, 200, (8, 8, 3)), np.ones((6, 6, 1)))
    return Image.fromarray(np.clip(coarse + random.normal(0, 12, (48, 48, 3)) + n % 30, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """120 pictures; of each a copy with a painted square, and a blurred one."""
    folder = tmp_path_factory.mktemp("audited")
    for n in range(120):
        own = picture(n)
        own.save(folder / f"{n}.png")
        own.filter(ImageFilter.GaussianBlur(4)).save(folder / f"blur-{n}.png")
        own.paste((90, 90, 90), (0, 0, 24, 12))
        own.save(folder / f"mask-{n}.png")
    return folder


def rows(other, category="other", count=120) -> list[dict]:
    return [
        {**SAME, "id": str(n), "images": [f"{n}.png"], "rejected_images": [other(n)], "category": category}
        for n in range(count)
    ]


def test_painted_and_blurred_pictures_give_themselves_away(folder):
    made = rows(lambda n: f"mask-{n}.png", "mask", 80)
    made += [{**row, "id": f"b{n}"} for n, row in enumerate(rows(lambda n: f"blur-{n}.png", "blur", 60))]
    one = audited(folder, made)
    found = one["pictures"]
    assert (found["pairs"], found["seen"], found["unreadable"]) == (140, 140, 0)
    assert {name: kind["pairs"] for name, kind in found["kinds"].items()} == {"mask": 80, "blur": 60}
    assert found["kinds"]["mask"]["percent"] == pytest.approx(100 * 80 / 140)
    assert found["kinds"]["mask"]["changed"]["median"] == pytest.approx(24 * 12 / 48**2, rel=0.1)
    assert found["kinds"]["blur"]["changed"]["median"] > 0.5
    assert all(kind["probe"]["accuracy"] > 95 for kind in found["kinds"].values())
    assert gates(one)["picture probe"] == "warn"
    assert "empty cells" in [entry["feature"] for entry in found["probe"]["top"]["rejected"]]


def test_swapped_pictures_do_not(folder):
    one = audited(folder, rows(lambda n: f"{n ^ 1}.png"))
    assert one["pictures"]["kinds"]["other"]["changed"]["median"] > 0.8
    low, high = one["pictures"]["probe"]["interval"]
    assert low <= 50 <= high
    assert gates(one)["picture probe"] != "warn"


def test_sets_without_rejected_images_have_no_such_gate(folder):
    plain = [{**SAME, "id": str(n), "images": [f"{n}.png"], "rejected": f"No {n}."} for n in range(60)]
    one = audited(folder, plain)
    assert one["pictures"] is None and "picture probe" not in gates(one)


def test_pictures_that_cannot_be_read_are_counted(folder, tmp_path):
    (folder / "broken.png").write_bytes(b"no picture")
    broken = {**rows(lambda n: "broken.png", count=1)[0], "id": "broken"}
    one = audited(folder, [broken, *rows(lambda n: f"{n ^ 1}.png", count=70)])
    assert (one["pictures"]["seen"], one["pictures"]["unreadable"]) == (70, 1)
    assert "broken.png' is not an image file" in one["pictures"]["first_unreadable"]
    one = audited(folder, [broken])
    assert one["pictures"]["probe"] is None and gates(one)["picture probe"] == "not measured"


def test_only_so_many_pictures_are_read(folder, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PICTURES", 60)
    one = audited(folder, rows(lambda n: f"{n ^ 1}.png"))
    assert (one["pictures"]["pairs"], one["pictures"]["seen"]) == (120, 60)


def test_features_say_what_they_are_called():
    def features(image):
        return dict(zip(NAMES, picture_features(image), strict=True))

    plain, own = features(Image.new("RGB", (40, 20))), features(picture(0))
    assert plain["black cells"] == plain["empty cells"] == 1 and plain["sharpness"] == 0
    assert own["black cells"] == own["empty cells"] == 0
    assert plain["pixels"] == pytest.approx(np.log(800)) and plain["width by height"] == pytest.approx(np.log(2))
    assert features(picture(0).filter(ImageFilter.GaussianBlur(2)))["sharpness"] < own["sharpness"] / 2
    half = picture(0)
    half.paste((0, 0, 0), (0, 0, 48, 24))
    assert features(half)["black cells"] == 0.5
    assert len(picture_features(Image.new("RGB", (3, 1)))) == len(NAMES)  # fewer pixels than cells


def test_changed_share_leaves_the_noise_of_jpeg_out(tmp_path):
    own = picture(0).filter(ImageFilter.GaussianBlur(3))
    own.save(tmp_path / "own.jpg", quality=95)
    assert changed_share(own, Image.open(tmp_path / "own.jpg")) < 0.02
    assert changed_share(own, own.resize((47, 48))) == 1


def test_the_command_and_its_page_show_them(folder, tmp_path):
    file = written(folder, "shown.jsonl", rows(lambda n: f"mask-{n}.png", "mask", 80))
    result = vapr(file, "--out", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    line = next(line for line in result.stdout.splitlines() if line.startswith("mask "))
    assert "12." in line and "100.0 %" in line
    assert "picture probe" in result.stdout and "rejected pictures have more of:" in result.stdout
    page = (tmp_path / "page.html").read_text()
    assert "Rejected images, by category" in page and "picture probe" in page
    json.loads(vapr(file, "--json").stdout)
