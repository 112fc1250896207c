"""Checks of a task's rows before they are scored. ``task`` is a `task.LocalTask`."""

from typing import Any


def check_rows(task: Any, limit: int | None = None) -> None:
    """Form every document that is scored, and raise ValueError on the first one that is bad.

    Bad are missing fields, labels out of range, and empty choices or continuations. Where rows
    are left out, bad ones are.
    """
    raw = task.rows[task.evaluated].rows
    kept = task.kept

    def examine(number: int, doc: dict[str, Any], place: str) -> None:
        if task.places is not None:
            # A data set fills fields that a row lacks with None, which a template would print.
            own = raw[number if kept is None else kept[number]]
            doc = {name: doc[name] for name in doc if doc[name] is not None or name in own}
        _check_document(task, doc, place)

    task.each(limit, examine)


def check_lengths(task: Any, limit: int | None = None) -> None:
    """Raise ValueError for a continuation longer than the context of ``model``, or leave its
    row out."""

    def examine(number: int, doc: dict[str, Any], place: str) -> None:
        empty = [""] * len(task.doc_to_choice(doc)) if task.multiple_input else ""
        made = task.construct_requests(doc=doc, ctx=empty, metadata=(None, number, 1))
        for instance in made if isinstance(made, list) else [made]:
            if instance.request_type != "loglikelihood":
                return
            text = instance.args[1]
            # No tokenizer makes more tokens of a text than it has bytes, and one in front.
            if len(text.encode()) < task.model.max_length:
                continue
            length = len(task.model.tok_encode(text, add_special_tokens=False))
            if length > task.model.max_length:
                raise ValueError(
                    f"{place}: choice {instance.idx + 1} of the task {task.config.task} has "
                    f"{length} tokens, more than the model's context of "
                    f"{task.model.max_length}; leave such rows out with --on_error=skip, or "
                    "take a model with a longer context"
                )

    if task.model is not None:
        task.each(limit, examine)


def _check_document(task: Any, doc: dict[str, Any], place: str) -> None:
    text = task.doc_to_text(doc)
    target = task.doc_to_target(doc)
    name = task.config.task
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(doc)
        if not choices:
            raise ValueError(f"{place}: the task {name} has no choices")
        for number, choice in enumerate(choices, 1):
            if not isinstance(choice, str) or not choice.strip():
                raise ValueError(f"{place}: choice {number} of the task {name} is empty")
        gold = text if task.multiple_input else target
        for label in gold if isinstance(gold, list) else [gold]:
            if isinstance(label, int):
                inside = 0 <= label < len(choices)
            else:
                inside = label in choices
            if not inside:
                raise ValueError(
                    f"{place}: the label {label!r} of the task {name} is outside of its "
                    f"{len(choices)} choices, 0 to {len(choices) - 1}"
                )
        if task.multiple_input and not str(target).strip():
            raise ValueError(f"{place}: the continuation of the task {name} is empty")
    elif task.OUTPUT_TYPE != "generate_until" and not str(target).strip():
        raise ValueError(f"{place}: the continuation of the task {name} is empty")


def count_cut(task: Any) -> int:
    """Return how many questions lose a part of their prompt on the left."""
    room = task.model.max_length
    cut = set()
    for instance in task.instances or []:
        if instance.request_type == "loglikelihood":
            whole = "".join(instance.args)
            # The harness keeps the last max_length + 1 tokens, of which the last is not read.
            if (
                instance.doc_id not in cut
                and len(whole.encode()) >= room
                and len(task.model.tok_encode(whole)) > room + 1
            ):
                cut.add(instance.doc_id)
    return len(cut)
