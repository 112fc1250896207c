"""Pages that show numbers by token: HTML of one file, readable without a network or scripts."""

import base64
import html
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

# Okabe and Ito's vermilion and blue, which the color-blind tell apart.
_HIGH = "213,94,0"
_LOW = "0,114,178"

_STYLE = """
:root { color-scheme: light dark; --ground: #fdfdfc; --ink: #1d1d1f; --soft: #5f6368;
  --line: #dcdcd8; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #17181a; --ink: #e9e9e7; --soft: #a2a5aa; --line: #3a3c40; } }
body { margin: 0 auto; max-width: 62rem; padding: 1.2rem; background: var(--ground);
  color: var(--ink); font: 1rem/1.5 system-ui, "Segoe UI", "Noto Sans", "Noto Sans CJK SC",
  "PingFang SC", "Microsoft YaHei", sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.soft { color: var(--soft); font-size: 0.9rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9;
  border-left: 0.25rem solid var(--line); padding: 0.2rem 0 0.2rem 0.8rem; }
.text span { border-radius: 0.15em; } .plain { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.5rem; border-bottom: 1px solid var(--line); text-align: right; }
th { font-weight: 600; color: var(--soft); font-size: 0.88rem; }
td.left, th.left { text-align: left; overflow-wrap: anywhere; max-width: 28rem; }
table.grid td { font-size: 0.8rem; border: 1px solid var(--line); white-space: pre; }
summary { cursor: pointer; color: var(--soft); }
""".strip()


class Shaded(NamedTuple):
    """A piece of text with a shade."""

    text: str
    shade: float | None  # 0 (none) to 1 (full); below 0 in the other color; None: in grey
    title: str = ""  # what a pointer on it is told


class Cell(NamedTuple):
    """A cell of a table with a shade."""

    text: str
    shade: float | None = None
    title: str = ""


def page(title: str, parts: Iterable[str]) -> str:
    """Return a page of ``parts``, which are HTML."""
    shown = html.escape(title)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            f"<title>{shown}</title>\n<style>{_STYLE}</style></head><body>\n<h1>{shown}</h1>",
            *parts,
            "</body></html>\n",
        ]
    )


def heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str, soft: bool = False) -> str:
    kind = ' class="soft"' if soft else ""
    return f"<p{kind}>{html.escape(text)}</p>"


def folded(summary: str, inner: str) -> str:
    """Return ``inner`` behind a line that opens it."""
    return f"<details><summary>{html.escape(summary)}</summary>\n{inner}</details>"


def shaded_text(pieces: Iterable[Shaded]) -> str:
    """Return a text whose pieces have a ground."""
    shown = []
    for piece in pieces:
        kind = ' class="plain"' if piece.shade is None else _ground(piece.shade)
        title = f' title="{html.escape(piece.title)}"' if piece.title else ""
        shown.append(f"<span{kind}{title}>{html.escape(piece.text)}</span>")
    return f'<div class="text">{"".join(shown)}</div>'


def picture(content: bytes, title: str) -> str:
    """Return a PNG inside the page."""
    data = base64.b64encode(content).decode()
    alt = html.escape(title)
    return f'<img style="max-width:100%" alt="{alt}" src="data:image/png;base64,{data}">'


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], left: Sequence[int]) -> str:
    """Return a table of texts and Cells; the columns ``left`` are aligned left."""
    kinds = [' class="left"' if number in left else "" for number in range(len(head))]
    lines = ["<tr>" + "".join(map("<th{}>{}</th>".format, kinds, map(html.escape, head))) + "</tr>"]
    for row in rows:
        lines.append("<tr>" + "".join(map(_cell, row, kinds)) + "</tr>")
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def grid(corner: str, columns: Sequence[str], rows: Iterable[tuple[str, Sequence[Cell]]]) -> str:
    """Return a heat map as a table: (name, cells) for each row."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    lines = [f'<tr><th class="left">{html.escape(corner)}</th>{head}</tr>']
    for name, cells in rows:
        shown = "".join(_cell(cell, "") for cell in cells)
        lines.append(f'<tr><th class="left">{html.escape(name)}</th>{shown}</tr>')
    return '<div class="wide"><table class="grid">\n' + "\n".join(lines) + "\n</table></div>"


def _cell(cell: str | Cell, kind: str) -> str:
    if isinstance(cell, str):
        return f"<td{kind}>{html.escape(cell)}</td>"
    ground = "" if cell.shade is None else _ground(cell.shade)
    title = f' title="{html.escape(cell.title)}"' if cell.title else ""
    return f"<td{kind}{ground}{title}>{html.escape(cell.text)}</td>"


def _ground(shade: float) -> str:
    """Return the style of a ground; numbers that are not finite have the full one."""
    strength = min(abs(shade), 1.0) if math.isfinite(shade) else 1.0
    color = _LOW if shade < 0 else _HIGH
    return f' style="background:rgba({color},{0.75 * strength:.3f})"'


# --- tokens as text


def grouped(pieces: Sequence[bytes]) -> list[tuple[int, int, str]]:
    """Return (first, stop, text) of groups of tokens that hold whole characters.

    ``pieces`` are their bytes (`Tokenizer.token_bytes`). Bytes that never become a character are
    shown as U+FFFD.
    """
    found = []
    first = 0
    held = b""
    for number, piece in enumerate(pieces):
        held += piece
        try:
            text = held.decode()
        except UnicodeDecodeError as error:
            # A character that may still end: at most 3 bytes of 4 are there.
            if error.reason == "unexpected end of data" and number + 1 < len(pieces):
                continue
            text = held.decode("utf-8", "replace")
        found.append((first, number + 1, text))
        first = number + 1
        held = b""
    return found


def token_texts(tokenizer, ids: Iterable[int]) -> list[str]:
    """Return each token as text, special ones by name, for labels of axes."""
    return [_shown(tokenizer, int(index)) for index in ids]


def _shown(tokenizer, index: int) -> str:
    return _bytes_of(tokenizer, index).decode("utf-8", "replace")


def _bytes_of(tokenizer, index: int) -> bytes:
    """Return the bytes that a token adds to a text, or the name of a special one."""
    if index < 0:  # a position of an image or of features
        return f"<prefix {-index}>".encode()
    if index >= tokenizer.vocab_size:
        return f"<unused {index}>".encode()
    if index in tokenizer.special_names:
        return tokenizer.special_names[index].encode()
    # Not `decode`, which takes the space before the first word of a text away.
    return tokenizer.token_bytes(index)


def shaded_tokens(
    tokenizer, ids: Sequence[int], shades: Sequence[float | None], titles: Sequence[str]
) -> list[Shaded]:
    """Return the tokens of a text as pieces, those that share a character as one.

    A piece of several tokens has the largest shade and all titles.
    """
    pieces = [_bytes_of(tokenizer, int(index)) for index in ids]
    found = []
    for first, stop, text in grouped(pieces):
        strengths = [shade for shade in shades[first:stop] if shade is not None]
        title = "\n".join(filter(None, titles[first:stop]))
        found.append(Shaded(text, max(strengths) if strengths else None, title))
    return found


def shade_of_loss(loss: float) -> float:
    """Return the shade of a loss in nats: full from 10 on, a probability of 0.005 %."""
    return loss / 10 if math.isfinite(loss) else 1.0
