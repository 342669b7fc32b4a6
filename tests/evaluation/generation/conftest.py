"""Questions about photographs of several sizes, some about two of them, some about none."""

import pytest
from PIL import Image

from vapr.evaluation.scoring.prediction import Question


@pytest.fixture(scope="session")
def pictures(tmp_path_factory, photo_root):
    """Photographs of five sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    sizes = {"cat": (60, 60), "coffee": (120, 60), "rocket": (64, 128), "astronaut": (112, 112), "coins": (90, 70)}
    names = {"cat": "chelsea", "coins": "coins"}
    found = {}
    for name, size in sizes.items():
        (source,) = list(photo_root.glob(f"{names.get(name, name)}.*"))
        found[name] = folder / f"{name}.png"
        Image.open(source).convert("RGB").resize(size).save(found[name])
    return found


@pytest.fixture(scope="session")
def questions(pictures) -> list[Question]:
    asked = [
        ("Is there a cat in the image?", ("cat",), "yes"),
        ("What is in the cup?", ("coffee",), "Coffee"),
        ("Is there a dog in the image? Answer yes or no.", ("rocket",), "No."),
        ("What do <image> and\n<image>\nhave in common?", ("rocket", "astronaut"), "Space"),
        ("How many coins lie on the table, and which of them is the largest one of all?", ("coins",), "24"),
        ("Name a colour.", (), "red"),
        ("Is the sky blue?", (), "Yes"),
        ("Is there an astronaut?", ("astronaut",), "yes"),
        ("Which of the two is larger?", ("coins", "cat"), "the cat"),
    ]
    return [
        Question(
            benchmark="pope", id=f"q{n}", question=text, answer=truth, images=tuple(pictures[name] for name in names),
            meta={"split": "random" if n % 2 else "popular", **({"image": names[0]} if names else {})},
        )
        for n, (text, names, truth) in enumerate(asked)
    ]  # fmt: skip
