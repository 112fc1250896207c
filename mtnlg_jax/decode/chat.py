"""A conversation with a model that was trained to chat."""

import dataclasses
from collections.abc import Callable
from typing import Any

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.data.tokenizer import Tokenizer
from mtnlg_jax.data.tokenizer.chat import Chat
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.results import Generated


class Conversation:
    """The turns so far, and the model that answers.

    ``messages``: {"role": ..., "content": ...} of each turn. Each answer reads the whole
    conversation again, as the chat template may write earlier turns differently later.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        decode: DecodeConfig,
        *,
        system: str | None = None,
        template: str | None = None,
        draft: Decoder | None = None,
        **variables: Any,
    ):
        """Begin a conversation.

        Args:
          decode: settings of the answers; they also end where the chat template ends one.
          system: the first message, of the system.
          template: text of a chat template, instead of the tokenizer's.
          draft: as in `generate`.
          variables: further names of the template, such as enable_thinking.

        Raises ValueError if there is no chat template.
        """
        self._chat = Chat(tokenizer, template)
        ends = dict.fromkeys((*decode.eos_token_id, *self._chat.ends()))
        self._decode = dataclasses.replace(decode, eos_token_id=tuple(ends))
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._draft = draft
        self._variables = variables
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        """Forget all turns but that of the system."""
        self.messages: list[dict[str, str]] = list(self._first)

    def ask(self, text: str, on_text: Callable[[str], None] | None = None) -> Generated:
        """Return the answer to a message of the user; ``on_text`` gets its text as it comes.

        Raises ValueError, and keeps the conversation as it was, if it does not fit the context or
        the chat template refuses it.
        """
        turns = [*self.messages, {"role": "user", "content": text}]
        tokens = self._chat.prompt(turns, **self._variables)
        # A full context leaves no token for an answer.
        if len(tokens) >= self._decoder.context:
            raise ValueError(
                f"the conversation has {len(tokens)} tokens and the model's context holds "
                f"{self._decoder.context} with the answer; begin a new one with /reset, or write "
                "less"
            )
        show = None if on_text is None else lambda _, text: on_text(text)
        (answer,) = generate(
            self._decoder, self._tokenizer, [tokens], self._decode, on_text=show, draft=self._draft
        )
        # The space before the first word belongs to its token rather than to the answer.
        self.messages = [*turns, {"role": "assistant", "content": answer.text.strip()}]
        return answer
