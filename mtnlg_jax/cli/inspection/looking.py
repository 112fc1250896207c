"""Run a mode of launch/inspect.py whose flags were checked."""

from typing import TYPE_CHECKING

from mtnlg_jax.cli.inspection import options

if TYPE_CHECKING:
    from mtnlg_jax.evaluate.inside.passages import Passage
    from mtnlg_jax.evaluate.inside.subject import Answer, Subject


def look(subject: "Subject", texts: list[str], names: list[str]) -> "Answer":
    """Return what the mode finds; ``texts`` are those of loss."""
    from mtnlg_jax.evaluate.inside import comparisons, readings

    mode = options.MODE.value
    if mode == "lens":
        return readings.lens(subject, options.given(options.TEXT), options.GUESSES.value)
    if mode == "attention":
        return readings.attention(subject, options.given(options.TEXT), options.LAYER.value)
    if mode == "loss":
        return readings.loss(subject, texts, names, options.STRIDE.value, options.GUESSES.value)
    if mode == "patch":
        return comparisons.patch(
            subject,
            options.given(options.CLEAN),
            options.given(options.CORRUPT),
            options.ANSWERS.value,
        )
    passages, total = find_passages(subject)
    return comparisons.influence(
        subject,
        options.PROMPT.value,
        options.given(options.CONTINUATION),
        passages,
        total,
        rank=options.RANK.value,
        damping=options.DAMPING.value or None,
        seed=options.SEED.value,
    )


def read_loss_texts() -> tuple[list[str], list[str]]:
    """Return the texts of --mode=loss and their names."""
    if options.MODE.value != "loss":
        return [], []
    if options.TEXT.value is not None:
        return [options.TEXT.value], ["text"]
    from mtnlg_jax.evaluate.texts import read_texts

    texts, _ = read_texts(options.INPUT.value, options.TEXT_KEY.value)
    texts = texts[: options.DOCUMENTS.value]
    return texts, [f"{options.INPUT.value}, document {at}" for at in range(len(texts))]


def find_passages(subject: "Subject") -> "tuple[list[Passage], int]":
    """Return the passages to rank, and the number of those from which they are drawn.

    Raises ValueError where the model has no training data of ours, or these are not what it was
    trained on.
    """
    from mtnlg_jax import foreign
    from mtnlg_jax.evaluate.inside.passages import passages_of_sources, passages_of_texts, sample
    from mtnlg_jax.evaluate.texts import read_texts

    context = subject.config.max_position_embeddings
    length = options.LENGTH.value or min(context, 256)
    if not 1 <= length <= context:
        raise ValueError(f"--length={length} is outside [1, {context}], the model's context")
    most = options.MOST.value
    seed = options.SEED.value
    if options.PASSAGES.value is not None:
        texts, _ = read_texts(options.PASSAGES.value, options.TEXT_KEY.value)
        found = passages_of_texts(subject.tokenizer, texts, options.PASSAGES.value, length)
        return sample(found, most, seed), len(found)
    workdir = options.WORKDIR.value
    if foreign.reader_of(workdir) is not None:
        raise ValueError(
            f"--workdir={workdir} has no training data beside it; give texts with --passages"
        )
    from mtnlg_jax.evaluate.why.settings import Settings
    from mtnlg_jax.train.inputs import load_data

    data = load_data(Settings(workdir, options.SET.value).at(subject.step))
    if data.tokenizer.fingerprint != subject.tokenizer.fingerprint:
        raise ValueError(
            "the data of the run have another tokenizer now; give those that it was trained on "
            "with --set=data.path=OUT"
        )
    sources = {tokens.location: tokens for stage in data.stages for tokens in stage.sources}
    return passages_of_sources(list(sources.values()), length, most, seed)
