"""Files of results: JSON, HTML and PNG."""

import io
import json
import math
from typing import Any

import numpy as np

from mtnlg_jax import storage


def finite(value: Any) -> Any:
    """Return ``value`` for JSON: numbers that are not finite are None."""
    if isinstance(value, dict):
        return {str(key): finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_results(
    folder: str, name: str, result: dict[str, Any], shown: str, drawn: bytes | None = None
) -> list[str]:
    """Write NAME.json, NAME.html and, if there is a picture, NAME.png to a folder or URL; return
    their names."""
    content = json.dumps(finite(result), sort_keys=True, ensure_ascii=False, allow_nan=False)
    files = {
        f"{name}.json": content.encode(errors="backslashreplace"),
        f"{name}.html": shown.encode(errors="replace"),
    }
    if drawn is not None:
        files[f"{name}.png"] = drawn
    for each, data in files.items():
        storage.write_file(folder, each, data)
    return list(files)


def png_of(figure: Any) -> bytes:
    """Return a figure of matplotlib as PNG, the same bytes for the same figure."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
    return content.getvalue()
