"""Decode images, without torch."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vapr.data.remote import display_name, fetched
from vapr.errors import UserError, one_line

MAXIMUM_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485
"""Pillow only warns here, and warnings are no business of several threads."""

READABLE_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
"""PIL modes that convert to RGB without losing range. 16-bit and float images would be clipped."""


def read_image(source: Path | bytes) -> Image.Image:
    """Decode an image and turn it upright. Its mode stays, because image processors differ in how they convert it.

    Raises:
        UserError: for a file that is no image, is cut short, animated, absurdly large, or of a mode RGB would clip.
    """
    with _opened(source) as image:
        return ImageOps.exif_transpose(image)


def image_size(source: Path | bytes) -> tuple[int, int]:
    """Return width and height of an image as :func:`read_image` gives it, from its header; raises as that does."""
    with _opened(source) as image:
        width, height = image.size
        on_its_side = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return (height, width) if on_its_side else (width, height)


@contextlib.contextmanager
def _opened(source: Path | bytes) -> Iterator[Image.Image]:
    """Open an image without decoding it; what is wrong with it, then or while it is read, is a UserError."""
    name = image_name(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else fetched(source)) as image:
            width, height = image.size
            if width * height > MAXIMUM_PIXELS:
                raise UserError(f"image {name} may be a decompression bomb: {width} x {height} pixels; scale it down")
            if image.mode not in READABLE_MODES:
                raise UserError(f"image {name} has mode {image.mode}, which RGB would clip; save it as 8-bit RGB")
            # Phones put a second picture behind the photograph (MPO); the first is meant.
            if (num_frames := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":
                raise UserError(f"image {name} is animated ({num_frames} frames); save one frame")
            if width * height == 0:
                raise UserError(f"image {name} has size {width} x {height}")
            yield image
    except Image.DecompressionBombError as error:
        raise UserError(f"image {name} may be a decompression bomb: {one_line(error)}") from None
    except UnidentifiedImageError:
        raise UserError(f"image {name} is not an image file") from None
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"image {name} cannot be read: {one_line(error)}") from None


def as_rgb(image: Image.Image) -> Image.Image:
    """Return the colours that a model is shown, as the installed transformers' image processors treat transparency."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    from transformers import CLIPImageProcessorPil  # seconds, for a picture in a hundred

    colours = CLIPImageProcessorPil(do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False)
    pixels = colours(images=[image], return_tensors="np")["pixel_values"][0]  # (3, height, width)
    return Image.fromarray(pixels.transpose(1, 2, 0).astype(np.uint8))


def image_name(source: Path | bytes) -> str:
    """Return how messages name an image."""
    return "in the row" if isinstance(source, bytes) else f"'{display_name(source)}'"
