"""Check images and features of rows: reading, preparing, and the rows that training gets."""

import base64
import io
import json
import struct
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import PIL.Image
import PIL.ImageOps
import pyarrow
import pyarrow.parquet
import pytest

from mtnlg_jax.config import MaskingConfig, PrefixConfig
from mtnlg_jax.data.batches import Batches, HeldOut
from mtnlg_jax.data.prefix import shapes
from mtnlg_jax.data.prefix.arrays import features_of, image_of
from mtnlg_jax.data.prefix.rows import PrefixInput, PrefixRows
from mtnlg_jax.data.prepare import describe, prepare
from mtnlg_jax.data.read.documents import read_documents
from mtnlg_jax.data.store import prefixes
from mtnlg_jax.data.store.convert import convert
from mtnlg_jax.data.store.sources import open_sources, open_tokens
from mtnlg_jax.data.tokenizer import load_tokenizer
from mtnlg_jax.train.objectives import causal_batch, masked_batch, with_prefix

SIZE = 8
MODEL = PrefixConfig(width=5, image_size=SIZE, patch_size=4)  # 4 positions
LENGTH = 16


def png(array) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


# --- one image, one array


def test_an_image_is_read_from_each_form(tmp_path):
    (tmp_path / "a.png").write_bytes(png(picture(0)))
    encoded = base64.b64encode(png(picture(0))).decode()
    forms = [
        png(picture(0)),
        "a.png",
        f"data:image/png;base64,{encoded}",
        {"bytes": png(picture(0)), "path": None},
        {"bytes": encoded},
        {"bytes": None, "path": "a.png"},
    ]
    for form in forms:
        np.testing.assert_array_equal(image_of(form, SIZE, 3, str(tmp_path)), picture(0))


def test_an_image_is_resized_converted_and_turned():
    flat = np.full((20, 6, 3), (10, 200, 30), np.uint8)
    np.testing.assert_array_equal(image_of(png(flat), 4), flat[:4, :4])
    # Rec. 601, as Pillow converts to gray.
    gray = image_of(png(flat), 4, channels=1)
    assert gray.shape == (4, 4, 1) and abs(int(gray[0, 0, 0]) - 124) <= 1
    left = np.zeros((SIZE, SIZE, 3), np.uint8)
    left[:, : SIZE // 2] = 255
    buffer = io.BytesIO()
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned to the right by a quarter: the left side becomes the top
    PIL.Image.fromarray(left).save(buffer, "PNG", exif=exif)
    np.testing.assert_array_equal(image_of(buffer.getvalue(), SIZE)[: SIZE // 2], 255)


def test_gray_of_16_bits_keeps_its_shades(tmp_path):
    shades = np.arange(SIZE * SIZE, dtype=np.uint16).reshape(SIZE, SIZE) * 1000
    for channels in (1, 3):
        found = image_of(png(shades), SIZE, channels)
        np.testing.assert_array_equal(found, np.repeat(shades[..., None] // 256, channels, -1))
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.ones((SIZE, SIZE), np.float32)).save(buffer, "TIFF")
    with pytest.raises(ValueError, match="a shade of 32 bits.*save it with 8 or 16"):
        image_of(buffer.getvalue(), SIZE)


def test_damage_to_the_notes_of_a_camera_is_one_error(monkeypatch):
    """Pillow raises errors of struct, and some others, for damaged EXIF data."""
    for error in (struct.error("short"), TypeError("bad operand"), OverflowError("too large")):
        monkeypatch.setattr(PIL.ImageOps, "exif_transpose", Mock(side_effect=error))
        with pytest.raises(ValueError, match="is not an image"):
            image_of(png(picture(0)), SIZE)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (b"plain text", "is not an image"),
        (png(picture(0))[:100], "is not an image"),
        ("data:image/png;base64,???", "is not base64"),
        (5, "neither a path nor the bytes"),
        ({"path": None}, "neither a path nor the bytes"),
    ],
    ids=["text", "cut short", "base64", "number", "nothing"],
)
def test_what_is_no_image_is_one_error(value, words):
    with pytest.raises(ValueError, match=words):
        image_of(value, SIZE)


def test_a_missing_image_names_its_folder():
    with pytest.raises(FileNotFoundError, match="'none.png' cannot be read.*relative to away"):
        image_of("none.png", SIZE, folder="away")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (npy(np.zeros((2, 3, 4))), r"holds \(2, 3, 4\)"),
        (npy(np.array([["a"]])), "holds"),
        (npy(np.array([[1.0, np.nan]])), "not finite"),
        (b"text", "not an array of features"),
    ],
)
def test_what_is_no_array_of_features_is_one_error(data, words):
    with pytest.raises(ValueError, match=words):
        features_of(data)


# --- a prepared folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write 12 rows, each of 6 pictures twice, and prepare them with a tokenizer."""
    place = tmp_path_factory.mktemp("pairs")
    with open(place / "pairs.jsonl", "w") as lines:
        for number in range(12):
            (place / f"{number % 6}.png").write_bytes(png(picture(number % 6)))
            row = {"image": f"{number % 6}.png", "text": f"picture {number % 6} line {number}"}
            lines.write(json.dumps(row) + "\n")
    made(place / "pairs.jsonl", place / "data", heldout=0.3)
    return place


def made(path, output, **options):
    given = {"prefix": PrefixInput("image", SIZE), "prompt": "", "answer": "{text}"}
    given |= {"vocab_size": 300, "progress": False}
    return prepare(path, output, **(given | options))


def decoded(folder, part):
    tokenizer = load_tokenizer(folder / "data/tokenizer")
    tokens = open_tokens(folder / "data" / part)
    for number in range(tokens.documents):
        start, stop = tokens.document_offsets[number : number + 2]
        image = tokens.prefixes.of_documents(np.array([number]))[0]
        yield tokenizer.decode(tokens.read(start, stop).tolist()), image


def test_each_document_keeps_its_image(folder):
    found = {part: list(decoded(folder, part)) for part in ("train", "heldout")}
    assert sorted(map(len, found.values())) != [0, 12]
    texts = [text for part in found.values() for text, _ in part]
    assert sorted(texts) == sorted(f"picture {n % 6} line {n}" for n in range(12))
    for part in found.values():
        for text, image in part:
            np.testing.assert_array_equal(image, picture(int(text.split()[1])))
    # Equal images are stored once, and are on one side.
    sides = [{text.split()[1] for text, _ in part} for part in found.values()]
    assert not sides[0] & sides[1]
    info = json.loads((folder / "data/prepared.json").read_text())
    assert info["train"]["prefix"]["count"] == len(sides[0])
    assert "images of 8 x 8 x 3" in describe(info)


def test_other_images_are_other_data(folder, tmp_path):
    """The fingerprint that a run records covers the images, not the texts alone."""
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    prints = []
    for shift in (0, 1):
        for row in rows:
            row["image"] = {"bytes": base64.b64encode(png(picture(shift))).decode()}
        path = tmp_path / f"{shift}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        prints.append(made(path, tmp_path / f"out{shift}", heldout=0.0)["fingerprint"])
    assert prints[0] != prints[1]


def test_texts_of_parquet_that_are_not_utf8_are_damage(tmp_path):
    captions = pyarrow.array([b"a caf\xe9", b"a ring"], pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"caption": captions, "image": [png(picture(0)), png(picture(1))]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")

    def read(on_error, encoding=""):
        rows = PrefixRows(PrefixInput("image", SIZE), "", "{caption}", "")
        with rows.keeping_in(str(tmp_path)):
            path = tmp_path / "rows.parquet"
            return [each.text for each in read_documents(path, rows, on_error, encoding=encoding)]

    with pytest.raises(ValueError, match=r"row 1: byte 0xe9 at 5 is not UTF-8; name its encoding"):
        read("raise")
    assert read("skip") == ["a caf\ufffd", "a ring"]
    assert read("raise", "cp1252") == ["a café", "a ring"]


def test_parquet_holds_bytes_or_structs(folder, tmp_path):
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    data = [(folder / row["image"]).read_bytes() for row in rows]
    texts = [row["text"] for row in rows]
    structs = [{"bytes": each, "path": "x.png"} for each in data]
    for name, column in (("bytes", data), ("structs", structs)):
        table = pyarrow.table({"image": column, "text": texts, "other": list(range(12))})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
        tokenizer = str(folder / "data/tokenizer")
        output = tmp_path / name
        made(tmp_path / f"{name}.parquet", output, tokenizer=tokenizer, heldout=0.3)
        one = open_tokens(output / "train").meta
        other = open_tokens(folder / "data/train").meta
        assert one["prefix"] == other["prefix"] and one["sha256"] == other["sha256"]


def test_an_image_that_is_none_stops_or_is_counted(folder, tmp_path):
    rows = (folder / "pairs.jsonl").read_text().splitlines()
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes((folder / f"{number}.png").read_bytes())
    (tmp_path / "text.png").write_text("no image")
    bad = [
        json.dumps({"image": "text.png", "text": "a"}),
        json.dumps({"image": "gone.png", "text": "a"}),
        json.dumps({"text": "a"}),
    ]
    for number, row in enumerate(bad):
        (tmp_path / f"{number}.jsonl").write_text("\n".join([*rows, row]))
        with pytest.raises(ValueError, match=rf"{number}.jsonl, line 13: .*(image|gone.png)"):
            made(tmp_path / f"{number}.jsonl", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    (tmp_path / "all.jsonl").write_text("\n".join([*rows, *bad]))
    info = made(tmp_path / "all.jsonl", tmp_path / "out", on_error="skip")
    assert (info["input"]["documents"], info["input"]["damaged"]) == (12, 3)


def test_features_have_one_shape(tmp_path):
    rows = []
    for number in range(4):
        np.save(tmp_path / f"{number}.npy", np.full((3, 2), number, np.float16))
        rows.append({"sound": f"{number}.npy", "text": f"text {number}"})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    made(path, tmp_path / "data", prefix=PrefixInput("sound"), heldout=0.0, vocab_size=280)
    tokens = open_tokens(tmp_path / "data/train")
    assert (tokens.prefixes.shape, tokens.prefixes.dtype) == ((3, 2), np.float32)
    found = tokens.prefixes.of_documents(np.arange(4))
    assert sorted(found[:, 0, 0]) == [0, 1, 2, 3]
    np.save(tmp_path / "3.npy", np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"line 4: features of shape \(2, 2\)"):
        made(path, tmp_path / "other", prefix=PrefixInput("sound"))


@pytest.mark.parametrize(
    ("path", "options", "words"),
    [
        ("pairs.jsonl", {"answer": None}, "rows with an answer"),
        ("pairs.jsonl", {"messages": "talk"}, "--messages reads"),
        ("pairs.jsonl", {"prefix": PrefixInput("picture", SIZE)}, "nothing under 'picture'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(folder, tmp_path, path, options, words):
    with pytest.raises(ValueError, match=words):
        made(folder / path, tmp_path / "out", **options)


def test_no_other_format_holds_images(folder, tmp_path):
    with pytest.raises(ValueError, match="has images or features"):
        convert(str(folder / "data/train"), str(tmp_path / "megatron"))


def test_a_damaged_store_is_named(folder, tmp_path):
    made(folder / "pairs.jsonl", tmp_path / "data")
    meta = json.loads((tmp_path / "data/train/meta.json").read_text())
    meta["prefix"]["count"] += 1
    (tmp_path / "data/train/meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="is damaged: its prefixes"):
        open_tokens(tmp_path / "data/train")


# --- rows for training


def opened(folder, model=MODEL):
    tokenizer, train, held_out = open_sources([str(folder / "data")])
    sources = [*train.values(), *held_out.values()]
    prefixes.attach(sources, model)
    return tokenizer, sources


def check_row(row, tokenizer, length=LENGTH):
    """Check one row of a causal batch: its prefix is that of its text, which alone is predicted."""
    count = MODEL.positions
    assert row["tokens"][:count].tolist() == [-1, -2, -3, -4]
    assert row["tokens"][count] == tokenizer.bos_id
    assert row["positions"].tolist()[: count + 1] == list(range(count + 1))
    used = row["segment_ids"] > 0
    assert set(row["segment_ids"][used]) == {1}
    predicted = row["labels"][row["weights"] > 0].tolist()
    assert predicted[-1] == tokenizer.eos_id
    text = tokenizer.decode(predicted[:-1])
    # The first word is predicted from <bos>, and nothing before it.
    assert row["weights"].nonzero()[0][0] == count
    np.testing.assert_array_equal(row["prefix"], picture(int(text.split()[1])))
    return text


def test_rows_hold_one_image_and_predict_its_text(folder):
    tokenizer, (train, held) = opened(folder)
    batches = Batches([(train, 1.0)], LENGTH, seed=0)
    for first in (0, train.documents):  # two epochs
        raw = batches.rows(np.arange(first, first + train.documents))
        made = with_prefix(causal_batch(raw), raw, MODEL)
        texts = [
            check_row({key: x[number] for key, x in made.items()}, tokenizer)
            for number in range(train.documents)
        ]
        assert len(set(texts)) == train.documents
    rows = HeldOut([(held, 1.0)], LENGTH, 100)
    raw = rows.read(rows.source, rows.window)
    made = with_prefix(causal_batch(raw), raw, MODEL)
    for number in range(len(rows)):
        check_row({key: x[number] for key, x in made.items()}, tokenizer)


def test_the_masked_objective_leaves_the_prefix_alone(folder, tmp_path):
    tokenizer, (train, _) = opened(folder)
    raw = Batches([(train, 1.0)], LENGTH, seed=0).rows(np.arange(4))

    class WithMask:
        mask_id = tokenizer.bos_id
        is_special = tokenizer.is_special
        starts_word = tokenizer.starts_word

    made = masked_batch(raw, np.arange(4), 0, MaskingConfig(), WithMask)
    made = with_prefix(made, raw, MODEL)
    assert (made["tokens"][:, :4] == -1 - np.arange(4)).all()
    assert not made["weights"][:, :4].any() and made["weights"].any()


def test_text_and_images_share_a_batch(folder, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"plain line {n}"}) for n in range(40)))
    prepare(
        text,
        tmp_path / "data",
        tokenizer=str(folder / "data/tokenizer"),
        heldout=0.1,
        progress=False,
    )
    _, (train, _) = opened(folder)
    plain = open_tokens(tmp_path / "data/train")
    raw = Batches([(train, 1.0), (plain, 1.0)], LENGTH, seed=0).rows(np.arange(32))
    made = with_prefix(causal_batch(raw), raw, MODEL)
    marked = (made["tokens"] < 0).any(1)
    np.testing.assert_array_equal(marked, raw["prefixed"] > 0)
    assert 8 < marked.sum() < 24
    assert not made["prefix"][~marked].any() and made["prefix"][marked].any()
    # A model with a prefix also trains on text alone.
    raw = Batches([(plain, 1.0)], LENGTH, seed=0).rows(np.arange(4))
    made = with_prefix(causal_batch(raw), raw, MODEL)
    assert made["prefix"].shape == (4, SIZE, SIZE, 3) and (made["tokens"] >= 0).all()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (PrefixConfig(), "the model takes text alone.*model.prefix.image_size=8"),
        (PrefixConfig(width=5, image_size=4, patch_size=4), "images of 4 x 4 pixels"),
        (PrefixConfig(length=4, width=5), "features of 4 positions"),
    ],
)
def test_a_model_of_another_prefix_is_refused(folder, model, words):
    with pytest.raises(ValueError, match=words):
        opened(folder, model)


def test_a_row_too_short_for_a_text_says_how_long(folder):
    _, (train, _) = opened(folder)
    with pytest.raises(ValueError, match="data.sequence_length=7 holds 3; raise it to"):
        Batches([(train, 1.0)], 7, seed=0)


# --- shapes


def test_held_out_combinations_are_never_seen():
    seen, held = shapes.split(0.2, seed=3)
    assert len(seen) == 216 and len(held) == 54 and not set(seen) & set(held)
    assert set(seen) | set(held) == set(shapes.combinations())
    # Each color, form and place alone is in both.
    for part in (seen, held):
        assert [len(set(column)) for column in zip(*part, strict=True)] == [6, 5, 9]


def test_a_picture_shows_its_combination():
    rng = np.random.default_rng(0)
    for color, form, place in shapes.combinations():
        image = shapes.draw((color, form, place), 36, rng).astype(float)
        near = np.abs(image - np.array(shapes.COLORS[color])).sum(-1) < 120
        row, column = divmod(shapes.PLACES.index(place), 3)
        inside = near[12 * row : 12 * row + 12, 12 * column : 12 * column + 12].sum()
        assert inside >= 20 and inside >= 0.9 * near.sum(), (color, form, place)
