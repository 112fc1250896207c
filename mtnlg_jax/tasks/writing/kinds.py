"""The kinds of text to write, and the words of their prompts in English and Chinese."""

import difflib
from dataclasses import dataclass

from mtnlg_jax.tasks.templates import LANGUAGES


@dataclass(frozen=True)
class Frame:
    """The words around the parts of a prompt in one language. ``{...}`` is replaced."""

    topic: str
    memory: str
    facts: str
    section: str  # with {number} and {count}
    following: str  # the heading after this one
    body: str  # what the text itself follows
    outline: str  # behind the instruction, where the headings are written
    part: str  # a heading where the model wrote none
    summary: str  # behind a text that is to be summarized
    heading: str  # behind a candidate, before log p of its heading
    about: str  # behind an outline, before log p of its topic
    space: str  # between one of these words and what the model writes after it
    fact_separator: str

    @property
    def stops(self) -> tuple[str, ...]:
        """Return strings that end a piece: a new line that begins like a part of the prompt."""
        parts = (self.topic, self.memory, self.facts, self.section, self.following)
        return ("\n## ", *("\n" + part.partition("{")[0].rstrip() for part in parts))


FRAMES = {
    "en": Frame(
        topic="Topic: {text}\n",
        memory="The text so far: {text}\n",
        facts="Names and facts: {text}\n",
        section="Section {number} of {count}: {text}\n",
        following="Next section: {text}\n",
        body="Text:\n",
        outline="Outline:\n",
        part="Part {number}",
        summary="\n\nSummary of the text above:",
        heading="\n\nHeading of the text above:",
        about="\nTopic of the outline above:",
        space=" ",
        fact_separator="; ",
    ),
    "zh": Frame(
        topic="主题：{text}\n",
        memory="前文摘要：{text}\n",
        facts="人名和事实：{text}\n",
        section="第{number}节（共{count}节）：{text}\n",
        following="下一节：{text}\n",
        body="正文：\n",
        outline="提纲：\n",
        part="第{number}部分",
        summary="\n\n以上内容的摘要：",
        heading="\n\n以上内容的标题：",
        about="\n以上提纲的主题：",
        space="",
        fact_separator="；",
    ),
}


@dataclass(frozen=True)
class Kind:
    name: str
    instructions: dict[str, str]  # by language
    headings: bool  # whether the text shows the headings of its sections


KINDS = {
    kind.name: kind
    for kind in (
        Kind("news", {"en": "Write a news report.", "zh": "写一篇新闻报道。"}, False),
        Kind("story", {"en": "Write a story.", "zh": "写一个故事。"}, True),
        Kind("review", {"en": "Write a review.", "zh": "写一篇评论。"}, True),
        Kind("description", {"en": "Describe a product.", "zh": "写一篇产品介绍。"}, True),
        Kind("letter", {"en": "Write a letter.", "zh": "写一封信。"}, False),
    )
}


def kind_of(name: str | None) -> Kind:
    """Return the kind of a name; raise ValueError for an unknown one."""
    if name not in KINDS:
        close = difflib.get_close_matches(name or "", KINDS, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown kind={name}; {hint}choose from {', '.join(KINDS)}")
    return KINDS[name]


def frame_of(language: str) -> Frame:
    """Return the words of a language; raise ValueError where there are none."""
    if language not in FRAMES:
        known = ", ".join(f"{name} ({LANGUAGES[name]})" for name in FRAMES)
        raise ValueError(f"language={language!r} has no prompts to write with; choose from {known}")
    return FRAMES[language]
