"""--chat: a conversation in the terminal, or with the lines of standard input."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtnlg_jax.cli.decoding import devices
from mtnlg_jax.cli.generation import options
from mtnlg_jax.cli.generation.answering import load_model
from mtnlg_jax.cli.generation.writing import load_draft

if TYPE_CHECKING:
    from mtnlg_jax.decode.chat import Conversation

_RESET = "/reset"


def chat(given: dict[str, Any]) -> None:
    """Load the model, and answer each line with the settings ``given`` until the input ends."""
    from mtnlg_jax.data.tokenizer.template import ChatTemplate, decode_template
    from mtnlg_jax.decode.chat import Conversation

    file = options.CHAT_TEMPLATE.value
    template = None if file is None else decode_template(Path(file).read_bytes(), file)
    if template is not None:
        try:
            ChatTemplate(template, {})  # is refused before the model is loaded
        except ValueError as error:
            raise ValueError(f"--chat_template={file}: {error}") from None
    run, decoder, decode = load_model([{"prompt": ""}], given)
    # The settings of a run may ask for several texts; a conversation goes on from one.
    decode = dataclasses.replace(decode, num_return_sequences=1)
    conversation = Conversation(
        decoder,
        run.tokenizer,
        decode,
        system=options.SYSTEM.value,
        template=template,
        draft=load_draft(run.tokenizer),
    )
    terminal = devices.on_first(sys.stdin.isatty)
    if terminal:
        devices.note(f"({_RESET} begins a new conversation; the end of input leaves)")
    lines = enumerate(_lines(terminal), 1)
    while (numbered := devices.on_first(lambda: next(lines, None))) is not None:
        number, line = numbered
        if line.strip() == _RESET:
            conversation.reset()
        elif line.strip():
            _answer(conversation, line, None if terminal else number)


def _lines(terminal: bool) -> Iterator[str]:
    """Yield the lines of standard input, each asked for on a terminal."""
    if not terminal:
        for number, raw in enumerate(sys.stdin.buffer, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"line {number} of standard input is not UTF-8 at byte {error.start}; convert "
                    "it, for example with iconv"
                ) from None
            yield line.rstrip("\r\n")
        return
    import readline  # noqa: F401 - gives input() its history and its keys

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _answer(conversation: "Conversation", line: str, number: int | None) -> None:
    """Print the answer to a line, as it comes unless --nostream.

    ``number`` is that of the line in a file; None on a terminal.
    """
    stream = options.STREAM.value is not False
    try:
        # Python keeps bytes that a terminal sent in another encoding as lone surrogates.
        if not line.isascii() and any("\ud800" <= letter <= "\udfff" for letter in line):
            raise ValueError("the line is not UTF-8; set the terminal's encoding to UTF-8")
        answer = conversation.ask(
            line, (lambda text: print(text, end="", flush=True)) if stream else None
        )
    except ValueError as error:
        # A person can go on; the lines of a file were meant to be answered one after another.
        if number is not None:
            raise ValueError(f"line {number} of standard input: {error}") from None
        print(f"error: {error}", file=sys.stderr)
        return
    print("" if stream else answer.text, flush=True)
    if answer.finish_reason != "stop":
        print(f"(cut off: {answer.finish_reason})", file=sys.stderr)
