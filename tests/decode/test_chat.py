"""Conversations: each answer is the generation of the rendered turns before it."""

import dataclasses

import pytest

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.data.tokenizer.chat import Chat
from mtnlg_jax.decode.chat import Conversation
from mtnlg_jax.decode.generate import generate

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a{{ mark }}{% endif %}"
)
SETTINGS = DecodeConfig(max_new_tokens=8)


def test_an_answer_reads_the_turns_before_it(learned, tokenizer):
    chat = Chat(tokenizer, TEMPLATE)
    conversation = Conversation(
        learned.decoder, tokenizer, SETTINGS, system="sea", template=TEMPLATE, mark="!"
    )
    turns = [{"role": "system", "content": "sea"}]
    shown = []
    texts = []
    for text in ("The cat", "天地"):
        turns.append({"role": "user", "content": text})
        answer = conversation.ask(text, shown.append)
        tokens = chat.prompt(turns, mark="!")
        assert tokens[-1] == tokenizer.encode("a!")[-1] and tokenizer.bos_id not in tokens
        (expected,) = generate(learned.decoder, tokenizer, [tokens], SETTINGS)
        assert answer == expected and answer.text
        texts.append(answer.text)
        turns.append({"role": "assistant", "content": answer.text.strip()})
        assert conversation.messages == turns
    assert "".join(shown) == "".join(texts)
    conversation.reset()
    assert conversation.messages == turns[:1]


def test_an_answer_ends_where_the_template_ends_one(learned, tokenizer):
    """Also if the settings name another end."""
    free = generate(
        learned.decoder, tokenizer, [Chat(tokenizer, TEMPLATE).prompt(_asked("The cat"))], SETTINGS
    )
    end = free[0].tokens[3]
    settings = dataclasses.replace(SETTINGS, eos_token_id=(end,))
    conversation = Conversation(learned.decoder, tokenizer, settings, template=TEMPLATE)
    assert conversation._decode.eos_token_id == (end, tokenizer.eos_id)
    answer = conversation.ask("The cat")
    assert answer.tokens == free[0].tokens[: free[0].tokens.index(end)]


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(learned, tokenizer):
    conversation = Conversation(learned.decoder, tokenizer, SETTINGS, template=TEMPLATE)
    conversation.ask("The cat")
    before = list(conversation.messages)
    with pytest.raises(ValueError, match="context holds .* /reset"):
        conversation.ask("x" * 5 * learned.decoder.context)
    assert conversation.messages == before


def _asked(text):
    return [{"role": "user", "content": text}]
