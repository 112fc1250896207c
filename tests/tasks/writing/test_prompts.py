"""Check that prompts hold their parts and fit the context, whatever the parts are."""

import dataclasses

import pytest

from mtnlg_jax.tasks.profile import Entry
from mtnlg_jax.tasks.writing.prompts import Memory
from mtnlg_jax.tasks.writing.request import Request, composer_of

HEADINGS = ("The sea", "The storm", "The end")
LONG = "The whale swam north, and nobody saw it again. "


def composer(tokenizer, context=512, topic="the whale and Anna", **fields):
    request = dataclasses.replace(Request("story", topic, 500, "en"), **fields)
    return composer_of(request, tokenizer, context)


def test_a_prompt_holds_its_parts_in_order(tokenizer):
    made = composer(tokenizer)
    prompt = made.of_piece(HEADINGS, 2, Memory("It swam.", ("Anna", "3 coins"), "It was cold."))
    assert prompt == (
        "Write a story.\nTopic: the whale and Anna\nThe text so far: It swam.\n"
        "Names and facts: Anna; 3 coins\nSection 2 of 3: The storm\nNext section: The end\n"
        "Text:\nIt was cold."
    )
    last = made.of_piece(HEADINGS, 3, Memory())
    assert "Next section" not in last and "so far" not in last and last.endswith("Text:\n")


def test_a_chinese_prompt_is_chinese(tokenizer):
    made = composer(tokenizer, topic="鲸鱼", language="zh", kind="news")
    prompt = made.of_piece(("大海", "风暴"), 1, Memory("鲸鱼向北。", ("王小明",), "天很冷。"))
    assert prompt == (
        "写一篇新闻报道。\n主题：鲸鱼\n前文摘要：鲸鱼向北。\n人名和事实：王小明\n第1节（共2节）：大海\n"
        "下一节：风暴\n正文：\n天很冷。"
    )


@pytest.mark.parametrize("context", [128, 160, 192, 256, 512])
def test_prompts_fit_the_context(tokenizer, context):
    made = composer(tokenizer, context, topic=LONG * 20)
    memory = Memory(LONG * 20, tuple(f"Name {i}" for i in range(12)), LONG * 40)
    for number in (1, 2, 3):
        prompt = made.of_piece(HEADINGS, number, memory)
        size = made.count(prompt)
        # Most of the room is used: the end of the text takes what other parts leave.
        assert context - made.piece - 24 <= size <= context - made.piece
        assert prompt.startswith(f"Write a story.\nTopic: {LONG[:8]}")
        assert f"Section {number} of 3: {HEADINGS[number - 1]}\n" in prompt
        assert prompt.rstrip().endswith(LONG.strip()[-12:])
    assert made.count(made.of_outline(HEADINGS * 9)) <= context - made.heading_tokens
    summary = made.of_summary(LONG * 20, LONG * 40)
    assert made.count(summary) <= context - made.summary_tokens
    assert summary.endswith("\n\nSummary of the text above:")


def test_each_part_keeps_to_its_share(tokenizer):
    made = composer(tokenizer, 256, topic=LONG * 20)
    prompt = made.of_piece(HEADINGS, 1, Memory("", (), LONG * 40))
    room = made._room(HEADINGS, 1)
    topic = prompt.split("\n")[1]
    assert room // 8 < len(tokenizer.encode(topic)) <= room // 4
    # A part that is short leaves the end of the text more.
    short = composer(tokenizer, 256).of_piece(HEADINGS, 1, Memory("", (), LONG * 40))
    assert short.count("swam") > prompt.split("Text:")[1].count("swam")


def test_a_context_that_is_too_small_is_one_error(tokenizer):
    with pytest.raises(ValueError, match="section 1, 'Part 1', needs") as caught:
        composer(tokenizer, 64)
    assert "context of 64" in str(caught.value) and "more positions" in str(caught.value)
    with pytest.raises(ValueError, match="section 2, 'The storm"):
        composer(tokenizer, 128, headings=("The sea", "The storm " * 9))
    # Shorter pieces leave the prompt more.
    composer(tokenizer, 64, piece=8)


def test_prompts_show_what_fits_of_a_profile(tokenizer):
    entries = (
        Entry("preference", "short sentences", 1),
        Entry("fact", "Anna is my whale", 2),
        Entry("fact", "I live in Bergen", 3),
    )
    plain = composer(tokenizer).of_piece(HEADINGS, 2, Memory())
    shown = composer(tokenizer, profile=entries).of_piece(HEADINGS, 2, Memory())
    before = "What the person wants:\n- short sentences\nAbout the person:\n- Anna is my whale\n\n"
    # The third entry shares no word with the topic.
    assert shown == before + plain
    with pytest.raises(ValueError, match="profile_share=0.05 of what a piece leaves of the"):
        composer(tokenizer, profile=entries, profile_share=0.05)
