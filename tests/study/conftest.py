"""A small POPE about six photographs."""

import json
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def pope(tmp_path, photo_root) -> Path:
    """A folder of three splits with eight questions each, and the pictures."""
    folder = tmp_path / "pope"
    folder.mkdir()
    names = ("astronaut", "coffee", "rocket", "chelsea", "coins", "page")
    for n, name in enumerate(names):
        (source,) = photo_root.glob(f"{name}.*")
        Image.open(source).convert("RGB").resize((60 + 10 * n, 90 - 5 * n)).save(folder / f"{name}.jpg")
    things = ("dog", "person in a white suit", "cup", "large red car beside the road", "cat", "coin", "book", "tree")
    for split in ("adversarial", "popular", "random"):
        with (folder / f"coco_pope_{split}.json").open("w") as file:
            for n, thing in enumerate(things):
                row = {
                    "question_id": n + 1, "image": f"{names[(n + len(split)) % 6]}.jpg",
                    "text": f"Is there a {thing} in the {split} image?", "label": "yes" if n % 2 else "no",
                }  # fmt: skip
                file.write(json.dumps(row) + "\n")
    return folder
