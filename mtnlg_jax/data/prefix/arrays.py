"""Read an image or an array of features: from a file, from bytes, or from the value of a row."""

import base64
import binascii
import io
import os
import struct
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import PIL.Image

_SHOWN = 60  # characters of a value in a message


def image_of(value: object, size: int, channels: int = 3, folder: str = "") -> np.ndarray:
    """Return an image as uint8 (size, size, channels).

    It is turned as its EXIF data say, converted to RGB or gray, and resized to a square by bilinear
    interpolation, whatever its proportions (as ViTImageProcessor of Hugging Face does). Of an
    animation the first picture is taken.

    Args:
      value: the bytes of a file that Pillow reads, such as PNG, JPEG or WebP; the path of one,
        relative to ``folder``; a data URL (data:image/png;base64,...); or a mapping with "bytes"
        (in JSON base64) or "path", as in the image columns of Hugging Face's data sets.

    Raises ValueError if it is no image, and FileNotFoundError if no file has that path.
    """
    import PIL.Image
    import PIL.ImageOps

    data, name = _bytes_of(value, folder)
    try:
        with warnings.catch_warnings():
            # A picture of more pixels than Pillow's limit may be an attack on the memory.
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(io.BytesIO(data)) as opened:
                turned = _of_8_bits(PIL.ImageOps.exif_transpose(opened))
                image = turned.convert("RGB" if channels == 3 else "L")
    # Pillow's readers raise all of these for damaged files.
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        IndexError,
        OverflowError,
        TypeError,
        struct.error,
        PIL.Image.DecompressionBombError,
        PIL.Image.DecompressionBombWarning,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, PIL.UnidentifiedImageError):
            reason = "its bytes are none that Pillow knows"
        raise ValueError(f"{name} is not an image ({reason}); give a PNG, JPEG or WebP") from None
    pixels = np.asarray(image.resize((size, size), PIL.Image.Resampling.BILINEAR), np.uint8)
    return pixels.reshape(size, size, channels)


def _of_8_bits(image: "PIL.Image.Image") -> "PIL.Image.Image":
    """Return an image whose shades of gray of 16 bits are scaled to 8; `convert` would cut them."""
    import PIL.Image

    if image.mode in ("I", "F"):
        raise ValueError("a shade of 32 bits has no known range; save it with 8 or 16")
    if not image.mode.startswith("I;16"):
        return image
    return PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def features_of(value: object, folder: str = "") -> np.ndarray:
    """Return features as float32 (positions, width).

    ``value`` is that of `image_of`, with the bytes of a .npy file. Raises ValueError if these are
    not one array of finite numbers of two dims, and FileNotFoundError if no file has that path.
    """
    data, name = _bytes_of(value, folder)
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{name} is not an array of features ({reason}); write it with numpy.save"
        ) from None
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "fiu":
        found = getattr(array, "shape", type(array).__name__)
        raise ValueError(
            f"{name} holds {found} of {getattr(array, 'dtype', 'several arrays')}, and features "
            "are numbers (positions, width)"
        )
    features = array.astype(np.float32)
    if not np.isfinite(features).all():
        raise ValueError(f"{name} holds a number that is not finite; look into what made it")
    return features


def _bytes_of(value: object, folder: str) -> tuple[bytes, str]:
    """Return (the bytes of a file, its name in messages)."""
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            inside = value["bytes"]
            data = _decoded(inside, "bytes") if isinstance(inside, str) else inside
            return data, repr(value.get("path") or "bytes")
        value = value.get("path")
    if isinstance(value, bytes | bytearray):
        return bytes(value), f"{len(value):,} bytes"
    if not isinstance(value, str) or not value:
        raise ValueError(
            f"a {type(value).__name__} is neither a path nor the bytes of a file; give one of them"
        )
    if value.startswith("data:"):
        return _decoded(value.partition(",")[2], "data URL"), f"{value[:_SHOWN]!r}"
    path = os.path.join(folder, value)
    try:
        with open(path, "rb") as file:
            return file.read(), repr(value)
    except (OSError, ValueError) as error:
        # A ValueError is a path with a zero byte.
        reason = getattr(error, "strerror", None) or str(error)
        raise FileNotFoundError(
            f"{value[:_SHOWN]!r} cannot be read ({reason}); paths are relative to "
            f"{folder or 'the current folder'}"
        ) from None


def _decoded(text: str, what: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"the {what} {text[:_SHOWN]!r} is not base64 ({error})") from None
