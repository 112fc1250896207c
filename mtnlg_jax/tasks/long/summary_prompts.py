"""The prompts of summaries by kind and length, in English and Chinese."""

import dataclasses

from mtnlg_jax.tasks.templates import Task, fill_in

# (instruction, name of the text, name of the summary) by kind and language
_WORDING = {
    "general": {
        "en": ("Summarize each text in {length}.", "Text", "Summary"),
        "zh": ("用{length}概括每篇正文。", "正文", "摘要"),
    },
    "news": {
        "en": (
            "Write a news story from each text in {length}: who did what, when, where and why.",
            "Text",
            "News story",
        ),
        "zh": (
            "用{length}把每篇正文写成新闻：何人、何事、何时、何地、何故。",
            "正文",
            "新闻",
        ),
    },
    "abstract": {
        "en": (
            "Write an abstract of each paper in {length}: the problem, the method, the results.",
            "Paper",
            "Abstract",
        ),
        "zh": ("用{length}为每篇论文写摘要：问题、方法、结果。", "论文", "论文摘要"),
    },
    "product": {
        "en": (
            "Write a product description from each text in {length}: what it is, what it does, "
            "whom it is for.",
            "Text",
            "Product description",
        ),
        "zh": (
            "用{length}根据每篇正文写商品介绍：是什么、有何功能、适合何人。",
            "正文",
            "商品介绍",
        ),
    },
}
_LENGTH = {"en": ("about {words} words", "one sentence"), "zh": ("大约{words}个字", "一句话")}
_PROMPT = {"en": "{text}: {input}\n{summary}:", "zh": "{text}：{input}\n{summary}："}
_SO_FAR = {
    "en": (" Take over what the summary so far says.", "Summary so far: {text}\n"),
    "zh": ("保留已有摘要的内容。", "已有摘要：{text}\n"),
}


def summary_task(task: Task, kind: str, words: int | None, language: str) -> Task:
    """Return the task with the prompt of a kind and length.

    Without either of them the task keeps its own prompt, on which a model may be fine-tuned.
    Languages without wording of their own are asked in English.
    """
    if kind == "general" and words is None:
        return task
    spoken = language if language in _PROMPT else "en"
    instruction, text, summary = _WORDING[kind][spoken]
    about, sentence = _LENGTH[spoken]
    length = sentence if words is None else fill_in(about, words=str(words))
    # {input} stays for the rows.
    prompt = fill_in(_PROMPT[spoken], text=text, summary=summary)
    return _with(
        task, language, instruction=fill_in(instruction, length=length) + "\n\n", prompt=prompt
    )


def refine_task(task: Task, language: str) -> Task:
    """Return the task with a prompt that also shows the summary so far, as a passage."""
    template = task.templates[language]
    also, passage = _SO_FAR[language if language in _SO_FAR else "en"]
    instruction = template.instruction.rstrip("\n") + also + "\n\n"
    return _with(
        task,
        language,
        instruction=instruction,
        prompt="{passages}" + template.prompt,
        passage=passage,
    )


def _with(task: Task, language: str, **fields) -> Task:
    template = dataclasses.replace(task.templates[language], **fields)
    return dataclasses.replace(task, templates={**task.templates, language: template})
