"""Render report.html: the input, what each stage removed and why, with examples. It is one file
that needs no network."""

import base64
import html
import io
from collections.abc import Iterable

_STYLE = """
body { font: 15px/1.5 system-ui, "Noto Sans CJK SC", sans-serif; max-width: 62em; margin: 2em auto;
  padding: 0 1em; color: #222 }
h1 { font-size: 1.6em } h2 { font-size: 1.25em; margin-top: 2em; border-bottom: 1px solid #ccc }
table { border-collapse: collapse; margin: 1em 0 }
th, td { padding: .2em .8em; text-align: right; border-bottom: 1px solid #eee }
th { text-align: right; font-weight: 600 } td:first-child, th:first-child { text-align: left }
.wide td, .wide th { text-align: left; vertical-align: top }
.bar { background: #4a7ab5; height: .8em; display: inline-block }
details { margin: .4em 0 } summary { cursor: pointer }
blockquote { margin: .3em 0 .8em 1em; padding-left: .8em; border-left: 3px solid #ddd;
  white-space: pre-wrap; overflow-wrap: anywhere }
code { overflow-wrap: anywhere }
.place { color: #777; font-size: .9em } del { background: #fdd } img { max-width: 100% }
"""
_LENGTHS = [1 << power for power in range(4, 25)]  # bytes, upper limits of the bins
BINS = len(_LENGTHS) + 1  # of a histogram of lengths


def bin_of(size: int) -> int:
    """Return the bin of a document of ``size`` bytes in the histograms of lengths."""
    return next((index for index, limit in enumerate(_LENGTHS) if size < limit), len(_LENGTHS))


def render(info: dict) -> str:
    """Return the HTML page for the result of `mtnlg_jax.data.recipe.run.make`."""
    parts = [f"<h1>{_text(info['name'])}</h1>", _summary(info), _flow(info["stages"])]
    parts += [_image(_lengths(info["stages"]), "documents by length, as read and as kept")]
    parts += [_stage(stage) for stage in info["stages"]]
    if "blend" in info:
        parts += ["<h2>Blend</h2>", _blend(info)]
    if "canaries" in info:
        parts += ["<h2>Canaries</h2>", _canaries(info["canaries"])]
    parts += ["<h2>Input</h2>", _inputs(info), "<h2>Output</h2>", _outputs(info)]
    settings = [
        [_text(key), f"<code>{_text(value)}</code>"] for key, value in info["settings"].items()
    ]
    parts += ["<h2>Settings</h2>", _table(["setting", ""], settings, "wide")]
    return (
        f"<!doctype html><html><head><meta charset=utf-8><title>{_text(info['name'])}</title>"
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _text(value) -> str:
    return html.escape(str(value))


def _table(head: Iterable, rows: Iterable[Iterable], kind: str = "") -> str:
    lines = ["<tr>" + "".join(f"<th>{_text(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return f"<table class='{kind}'>{''.join(lines)}</table>"


def _size(count: int) -> str:
    for unit, size in (("GB", 1 << 30), ("MB", 1 << 20), ("KB", 1 << 10)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:,} B"


def _summary(info: dict) -> str:
    first = info["stages"][0]
    last = info["stages"][-1]
    documents = last["documents"][1]
    size = last["bytes"][1]
    came = first["documents"][1]
    read = first["bytes"][1]
    lines = [
        f"{came:,} documents ({_size(read)}) were read; {documents:,} ({_size(size)}, "
        f"{size / max(1, read):.1%} of the text) are kept."
    ]
    if "tokens" in info:
        lines += [
            f"{info['tokens']['train']:,} tokens to train on, {info['tokens']['heldout']:,} held "
            f"out; the tokenizer ({_text(info['tokenizer']['kind'])}) has "
            f"{info['tokenizer']['vocab_size']:,} pieces."
        ]
        if losses := info["tokenizer"].get("losses"):
            lines.append(f"It is not lossless; a text loses {_text(', '.join(losses))}.")
    return f"<p>{' '.join(lines)}</p>"


def _flow(stages: list[dict]) -> str:
    most = max(1, *(stage["bytes"][0] for stage in stages), stages[0]["bytes"][1])
    rows = []
    for stage in stages:
        before, after = stage["documents"]
        size_before, size_after = stage["bytes"]
        removed = f"{size_before - size_after:,}" if size_before else ""
        share = f"{(size_before - size_after) / size_before:.2%}" if size_before else ""
        rows.append(
            [
                _text(stage["name"]),
                f"{before:,}" if size_before else "",
                f"{after:,}",
                _size(size_after),
                removed,
                share,
                _bar(size_after, most),
            ]
        )
    return _table(
        ["stage", "documents in", "documents out", "text out", "bytes removed", "share", ""], rows
    )


def _bar(size: int, most: int) -> str:
    return f"<span class=bar style='width:{12 * size / max(1, most):.2f}em'></span>"


def _stage(stage: dict) -> str:
    parts = [f"<h2>{_text(stage['name'].capitalize())}</h2>"]
    if stage.get("note"):
        parts.append(f"<p>{_text(stage['note'])}</p>")
    counts = [(rule, "dropped", number) for rule, number in stage["dropped"].items()]
    counts += [(rule, "changed", number) for rule, number in stage["changed"].items()]
    if counts:
        counts.sort(key=lambda row: (row[1], -row[2], row[0]))
        parts.append(
            _table(
                ["rule", "", "documents"],
                [[_text(rule), kind, f"{n:,}"] for rule, kind, n in counts],
            )
        )
    elif stage["bytes"][0]:
        parts.append("<p>Nothing was removed.</p>")
    for name, values in stage.get("tables", {}).items():
        rows = sorted(values.items(), key=lambda item: (-item[1], item[0]))
        parts.append(
            _table([name, "", ""], [[_text(key), f"{n:,}", _bar(n, rows[0][1])] for key, n in rows])
        )
    for rule, examples in sorted(stage["examples"].items()):
        shown = "".join(
            f"<div class=place>{_text(place)}</div><blockquote>{_text(text)}</blockquote>"
            for place, text in examples
        )
        parts.append(f"<details><summary>examples: {_text(rule)}</summary>{shown}</details>")
    return "".join(parts)


def _lengths(stages: list[dict]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.subplots()
    for stage, label, style in ((stages[0], "read", "0.75"), (stages[-1], "kept", "#4a7ab5")):
        width = 0.9 if style == "0.75" else 0.6
        axes.bar(range(len(stage["lengths"])), stage["lengths"], width, color=style, label=label)
    used = [
        i
        for i in range(len(stages[0]["lengths"]))
        if stages[0]["lengths"][i] or stages[-1]["lengths"][i]
    ]
    axes.set_xticks(
        range(len(_LENGTHS)),
        [f"< {_size(limit).replace('.0', '')}" for limit in _LENGTHS],
        rotation=60,
    )
    if used:
        axes.set_xlim(used[0] - 0.6, used[-1] + 0.6)
    axes.set_ylabel("documents")
    axes.legend()
    return figure


def _image(figure, words: str) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    content = base64.b64encode(file.getvalue()).decode()
    return f"<img alt='{_text(words)}' src='data:image/png;base64,{content}'>"


def _blend(info: dict) -> str:
    rows = [
        [
            _text(row["name"]),
            f"{row['documents']:,}",
            f"{row['tokens']:,}",
            f"{row['bytes_per_token']:.2f}",
            f"{row['weight']:.5f}",
            f"{row['epochs']:.2f}",
        ]
        for row in info["blend"]
    ]
    return (
        _table(["source", "documents", "tokens", "bytes / token", "weight", "epochs"], rows)
        + f"<p>Epochs of each source in {info['train_tokens']:,} tokens of training.</p>"
    )


def _canaries(found: dict) -> str:
    rows = [[_text(copies), f"{number:,}"] for copies, number in found["canaries"].items()]
    formats = ", ".join(f"<code>{_text(form)}</code>" for form in found["formats"])
    return _table(["copies of each", "canaries"], rows) + (
        f"<p>{found['documents']:,} documents of {_size(found['bytes'])} were planted among those "
        f"to train on, as {formats}. canaries.json records them for an audit.</p>"
    )


def _inputs(info: dict) -> str:
    rows = [
        [_text(name), _size(entry["size"]), f"<code>{_text(entry['sha256'])}</code>"]
        for name, entry in info["inputs"].items()
    ]
    shown = _table(["file", "size", "sha256"], rows[:200], "wide")
    return shown + (
        f"<p>and {len(rows) - 200:,} more, in report.json</p>" if len(rows) > 200 else ""
    )


def _outputs(info: dict) -> str:
    return _table(
        ["part", "sha256"],
        [
            [_text(name), f"<code>{_text(digest)}</code>"]
            for name, digest in info["outputs"].items()
        ],
        "wide",
    )
