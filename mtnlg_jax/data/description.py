"""Describe prepared data for people, in a few lines."""

from collections.abc import Iterator

from mtnlg_jax.data.canaries import CANARIES
from mtnlg_jax.data.read.documents import note_lines


def describe(info: dict) -> str:
    """Return a short report for people of what `prepare` or `recipe.run.make` returned."""
    rows = [*_input_rows(info), *_stage_rows(info), *_tokenizer_rows(info), *_canary_rows(info)]
    rows += _token_rows(info)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {words}" for name, words in rows)


def _input_rows(info: dict) -> Iterator[tuple[str, str]]:
    if "input" not in info:
        return
    read = info["input"]
    files = (
        f", from {read['files']:,} files ({read['skipped_files']:,} of unknown suffix skipped)"
        if read["files"]
        else ""
    )
    yield "read", f"{read['documents']:,} documents, {read['bytes']:,} bytes{files}"
    yield "dropped", f"{read['empty']:,} empty, {read['damaged']:,} damaged"
    yield (
        "repaired",
        f"{read['repaired']:,} documents with invalid UTF-8, {read['control_characters']:,} "
        "control characters",
    )
    yield from (("", line) for line in note_lines(read["notes"]))


def _stage_rows(info: dict) -> Iterator[tuple[str, str]]:
    """Yield a row of the description for each stage of a recipe: what it kept."""
    for stage in info.get("stages", ()):
        before, after = stage["documents"]
        size, left = stage["bytes"]
        most = sorted(stage["dropped"].items(), key=lambda item: -item[1])[:3]
        rules = ", ".join(f"{count:,} {rule}" for rule, count in most)
        kept = (
            f"{after:,} of {before:,} documents, {left / size:.2%} of the text"
            if size
            else f"{after:,} documents, {left:,} bytes"
        )
        yield stage["name"], kept + (f"; dropped: {rules}" if rules else "")
        yield from (("", line) for line in note_lines(stage.get("notes", {})))


def _tokenizer_rows(info: dict) -> Iterator[tuple[str, str]]:
    if "tokenizer" not in info:
        return
    tokenizer = info["tokenizer"]
    yield "tokenizer", f"{tokenizer['kind']}, {tokenizer['vocab_size']:,} pieces"
    if losses := tokenizer.get("losses"):
        yield "", f"it is not lossless; a text loses {', '.join(losses)}"


def _ahead(part: dict) -> str:
    """Return what stands ahead of the documents of a part."""
    found = part.get("prefix")
    if found is None:
        return ""
    size = " x ".join(map(str, found["shape"]))
    kind = "images" if found["dtype"] == "uint8" else "arrays of features"
    return f"; {found['count']:,} {kind} of {size}"


def _token_rows(info: dict) -> Iterator[tuple[str, str]]:
    for row in info.get("blend", ()):
        yield (
            row["name"],
            f"{row['tokens']:,} tokens, weight {row['weight']:.5f}, {row['epochs']:.2f} epochs "
            f"in {info['train_tokens']:,} tokens",
        )
    if "tokens" in info:  # of a recipe
        counts = info["tokens"]
        yield "tokens", f"{counts['train']:,} to train on, {counts['heldout']:,} held out"
    for name in ("train", "heldout"):
        if name in info:
            part = info[name]
            ratio = part["bytes"] / max(1, part["tokens"])
            answers = (
                f"; {part['answer_tokens']:,} tokens are answers" if "answer_tokens" in part else ""
            )
            yield (
                name,
                f"{part['documents']:,} documents, {part['bytes']:,} bytes, {part['tokens']:,} "
                f"tokens, {ratio:.2f} bytes/token{answers}{_ahead(part)}",
            )
    if "heldout" in info and not info["heldout"]["tokens"]:
        yield "", "nothing is held out: there will be no held-out loss"
    for number, pieces in enumerate(info.get("examples", ())):
        yield "" if number else "examples", "|".join(pieces)


def _canary_rows(info: dict) -> Iterator[tuple[str, str]]:
    if found := info.get("canaries"):
        number = sum(found["canaries"].values())
        copies = ", ".join(found["canaries"])
        yield (
            "canaries",
            f"{number:,}, each planted {copies} times: {found['documents']:,} documents of "
            f"{found['bytes']:,} bytes, recorded in {CANARIES}",
        )
