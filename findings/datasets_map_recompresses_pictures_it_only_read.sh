#!/usr/bin/env bash
# datasets 5.2.0, pillow 12.3.0, pyarrow 26.0.1.
#
# A function given to Dataset.map that reads row["image"] and returns only {"width": ...} changes the pictures: a value
# that was looked at is written again, from decoded pixels, with Pillow's defaults for its format. A JPEG comes back at
# quality 75, a lossless WebP as a lossy one, without a word, and the next such map compresses the result once more;
# printing the row is enough. One would expect the column not returned to keep its bytes, as it does when the function
# reads only the text, when input_columns=["image"] hands the same picture over, in filter, and for pictures that are
# files rather than bytes of a parquet file. Scores and training on small print then depend on whether somebody counted
# widths before.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 pillow==12.3.0 pyarrow==26.0.1 numpy==2.3.5
cd "$folder"
HF_HUB_OFFLINE=1 HF_HOME="$folder/home" HF_DATASETS_DISABLE_PROGRESS_BARS=1 venv/bin/python - <<'PY'
import contextlib
import io

import datasets
import numpy
from PIL import Image, ImageDraw

picture = Image.new("RGB", (240, 80), (250, 245, 235))
draw = ImageDraw.Draw(picture)
for line in range(6):
    colour = (200 - 40 * line, 20 + 40 * line, 30)
    draw.text((4, 4 + 12 * line), f"Invoice {line}: 1,{line}38.60 due 0{line}/07", fill=colour)


def in_parquet(suffix, **options):
    """Return the data set of one row whose picture lies in a parquet file, as on the Hub."""
    content = io.BytesIO()
    picture.save(content, suffix, **options)
    rows = [{"image": {"bytes": content.getvalue(), "path": f"1.{suffix.lower()}"}, "text": "How much is due?"}]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).to_parquet(f"{suffix}.parquet")
    return datasets.Dataset.from_parquet(f"{suffix}.parquet")


def printed(row):
    """Print the row to nowhere, as one does to look at it."""
    with contextlib.redirect_stdout(io.StringIO()):
        print(row)
    return {"width": 0}


def seen(before, name, after):
    """Print how far the picture moved, and return whether bytes and pixels are those of before."""
    stored = [data.cast_column("image", datasets.Image(decode=False))[0]["image"] for data in (before, after)]
    pixels = [numpy.asarray(data[0]["image"].convert("RGB")).astype(int) for data in (before, after)]
    moved = abs(pixels[0] - pixels[1])
    size = ["a file" if one["bytes"] is None else f"{len(one['bytes'])} bytes" for one in stored]
    print(f"{name:42} {size[0]:>11} -> {size[1]:>11}, pixels move by {moved.mean():.2f}, at most {moved.max()}")
    return stored[0]["bytes"] == stored[1]["bytes"], not moved.any()


def read(row):
    return {"width": row["image"].width}


jpeg = in_parquet("JPEG", quality=95, subsampling=0)
same = (True, True)
assert seen(jpeg, "JPEG, map reads the text", jpeg.map(lambda row: {"length": len(row["text"])})) == same
assert seen(jpeg, "JPEG, filter reads the picture", jpeg.filter(lambda row: row["image"].width > 9)) == same
by_column = jpeg.map(lambda image: {"width": image.width}, input_columns=["image"])
assert seen(jpeg, 'JPEG, map with input_columns=["image"]', by_column) == same
jpeg_read = jpeg.map(read)
assert jpeg_read[0]["width"] == picture.width
assert seen(jpeg, "JPEG, map reads the picture", jpeg_read) == (False, False)
again = jpeg_read.map(lambda row: {"height": row["image"].height})
assert seen(jpeg_read, "the result, another map reads the picture", again) == (False, False)
assert seen(jpeg, "JPEG, map prints the row", jpeg.map(printed)) == (False, False)
webp = in_parquet("WEBP", lossless=True)
assert seen(webp, "lossless WebP, map reads the picture", webp.map(read)) == (False, False)
png = in_parquet("PNG")
assert seen(png, "PNG, map reads the picture", png.map(read))[1]
picture.save("1.jpg", quality=95, subsampling=0)
file = datasets.Dataset.from_list([{"image": "1.jpg"}]).cast_column("image", datasets.Image())
assert seen(file, "JPEG in a file, map reads the picture", file.map(read)) == same
PY
