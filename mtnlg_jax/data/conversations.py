"""Conversations as training data: rows of messages, with the loss on the assistant's turns."""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mtnlg_jax.data.encode import Encoded, Text
from mtnlg_jax.data.store.tokens import token_dtype
from mtnlg_jax.data.tokenizer import Tokenizer
from mtnlg_jax.data.tokenizer.chat import Chat, TrainingRow
from mtnlg_jax.data.tokenizer.template import decode_template


class Conversations:
    """Rows of messages and the chat template that renders them."""

    def __init__(self, tokenizer: Tokenizer, key: str, sequence_length: int | None = None):
        """``key``: that of the messages in a row. ``sequence_length``: that of the training, so
        that longer conversations are refused.

        Raises ValueError if the tokenizer has no chat template.
        """
        self._tokenizer = tokenizer
        self._chat = Chat(tokenizer)
        self._key = key
        self._longest = None if sequence_length is None else sequence_length + 1

    def make(self, row: object) -> str:
        """Return the conversation of a row as a line of JSON, for `read_documents`.

        Raises ValueError if it cannot be trained on.
        """
        if not isinstance(row, dict) or self._key not in row:
            found = ", ".join(list(row)[:8]) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"no {self._key!r} among {found}; name the right one with --messages")
        kept = {"messages": row[self._key]}
        if row.get("tools"):
            kept["tools"] = row["tools"]
        made = self._row(kept)
        if self._longest is not None and len(made.tokens) > self._longest:
            raise ValueError(
                f"the conversation has {len(made.tokens)} tokens, and "
                f"sequence_length={self._longest - 1} holds {self._longest}; raise it, or shorten "
                "the conversation"
            )
        return json.dumps(kept, ensure_ascii=False)

    def row(self, line: str) -> TrainingRow:
        """Return the tokens of what `make` made."""
        return self._row(json.loads(line))

    def encode(self, texts: Iterable[Text]) -> Iterator[Encoded]:
        """Yield the tokens of conversations, in place of `encode_documents`."""
        dtype = token_dtype(self._tokenizer.vocab_size)
        for text in texts:
            row = self.row(text.decode())
            tokens = np.array(row.tokens, dtype)
            trained = map(self._tokenizer.token_bytes, tokens[row.answers].tolist())
            size = sum(map(len, trained))
            yield Encoded(tokens, len(row.text.encode()), answers=(row.answers, size))

    def show(self, line: str) -> None:
        """Print what `make` made, with what is trained on marked."""
        row = self.row(line)
        print(f"--- {int(row.answers.sum()):,} of {len(row.tokens):,} tokens are trained on ---")
        print(shown(row, self._tokenizer, color=sys.stdout.isatty()), flush=True)

    def _row(self, kept: dict[str, Any]) -> TrainingRow:
        more = {"tools": kept["tools"]} if "tools" in kept else {}
        return self._chat.training_row(kept["messages"], **more)


def shown(row: TrainingRow, tokenizer: Tokenizer, color: bool) -> str:
    """Return the text of a row with what is trained on in green, or between « and » without
    ``color``."""
    before, after = ("\033[32m", "\033[0m") if color else ("«", "»")
    parts = []
    begins = 0
    for stop in [*np.flatnonzero(np.diff(row.answers)) + 1, len(row.tokens)]:
        text = tokenizer.decode(row.tokens[begins:stop], skip_special=False)
        parts.append(f"{before}{text}{after}" if row.answers[begins] else text)
        begins = stop
    return "".join(parts)


def open_conversations(
    tokenizer: Tokenizer | None,
    key: str | None,
    template: str | os.PathLike | None,
    sequence_length: int | None,
) -> Conversations | None:
    """Return the maker of conversations, or None without a ``key``.

    Its tokenizer keeps the file ``template`` as its own.

    Raises ValueError if there is no tokenizer or no template.
    """
    if key is None:
        return None
    if tokenizer is None:
        raise ValueError(
            "--messages needs the tokenizer of a model, whose chat template renders them; give "
            "--tokenizer=RUN/tokenizer, or the folder of one"
        )
    if template is not None:
        content = Path(template).read_bytes()
        decode_template(content, os.fspath(template))
        tokenizer.companions = {**tokenizer.companions, "chat_template.jinja": content}
    return Conversations(tokenizer, key, sequence_length)
