"""Documents translated by groups: layout, order, choice by glossary and memory, comparison."""

import dataclasses
import itertools

import pytest

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode.results import Generated
from mtnlg_jax.tasks.long import translate
from mtnlg_jax.tasks.long.comparing import align, bead_cost, with_reference
from mtnlg_jax.tasks.long.glossary import Term, TermMemory, read_glossary, terms_in
from mtnlg_jax.tasks.long.options import LongOptions
from mtnlg_jax.tasks.long.run import perform_long
from mtnlg_jax.tasks.templates import TASKS
from mtnlg_jax.tasks.work import Paragraph

TASK = TASKS["translate"]
GREEDY = DecodeConfig(max_new_tokens=24)


def test_a_document_keeps_its_paragraphs_lists_and_quotation_marks(memory):
    source = (
        "# Hello, captain.\n\n“Hello, captain.”\n\n- Hello, captain.\n  1. Hello, captain.\n***\n"
    )
    options = LongOptions(previous=0)
    answer = perform_long(*memory, TASK, [source], options=options, decode=GREEDY)[0]
    assert answer.text == source.replace("Hello, captain.", "你好，船长。")
    assert answer.language == "zh" and answer.work.calls == answer.work.parts == 4
    assert [source[each.start : each.end] for each in answer.work.paragraphs] == [
        "Hello, captain."
    ] * 4


@pytest.mark.parametrize("rest", ["\n\n```\nHello, captain.\n```\n", "\n* * *\n"])
def test_a_single_paragraph_keeps_what_follows_it(memory, rest):
    answer = perform_long(*memory, TASK, [f"Hello, captain.{rest}"], decode=GREEDY)[0]
    assert answer.text == f"你好，船长。{rest}"


def test_the_round_trip_and_the_reference_are_compared(memory):
    source = "Hello, captain.\n\nHello, captain."
    options = LongOptions(previous=0, reference="你好，船长。\n\n再见，船长。", round_trip=True)
    answer = perform_long(*memory, TASK, [source], options=options, decode=GREEDY)[0]
    reference, back = answer.work.comparisons
    assert reference.against == "reference" and back.against.startswith("source after")
    assert [each.ours for each in reference.paragraphs] == [(1,), (2,)]
    assert reference.paragraphs[0].chrf == 100 > reference.paragraphs[1].chrf > 0
    assert len(back.paragraphs) == 2 and answer.work.calls == 4


def _writer(monkeypatch, choices):
    """Replace generation: ``choices`` maps a prompt to [(text, mean log-probability)]."""
    prompts = []

    def generate(decoder, tokenizer, tokens, configs):
        texts = [tokenizer.decode(each) for each in tokens]
        prompts.append(texts)
        return [
            Generated(i, (1, 2), f"{text}\n", "stop", (score, score))
            for i, prompt in enumerate(texts)
            for text, score in choices(prompt)
        ]

    monkeypatch.setattr(translate, "generate", generate)
    return prompts


def _last(prompt: str) -> str:
    return prompt.rsplit("English: ", 1)[1].removesuffix("\nChinese:")


def test_the_glossary_is_in_the_prompt_and_chooses_among_candidates(random_model, monkeypatch):
    def choices(prompt):
        asked = _last(prompt)
        if asked == "The captain slept.":
            return [("他睡觉。", -0.1), ("船长睡觉。", -0.9)]
        return [("大海。", -0.1), ("北方。", -0.2)]

    prompts = _writer(monkeypatch, choices)
    terms = (Term("captain", "船长"), Term("whale", "鲸鱼"), Term("cook", "厨师"))
    text = "The captain slept. The whale swam.\n\nThe captain slept."
    answer = perform_long(*random_model, TASK, [text], options=LongOptions(glossary=terms))[0]
    assert answer.text == "船长睡觉。大海。\n\n船长睡觉。"
    assert "English: captain\nChinese: 船长\n\nEnglish: The captain slept." in prompts[0][0]
    # The group just translated stands before the next, behind its terms.
    assert prompts[1][0].endswith(
        "English: whale\nChinese: 鲸鱼\n\nEnglish: The captain slept.\nChinese: 船长睡觉。\n\n"
        "English: The whale swam.\nChinese:"
    )
    uses = [dataclasses.astuple(each) for each in answer.work.terms]
    assert uses == [("captain", "船长", 2, 2, ()), ("whale", "鲸鱼", 1, 0, (1,))]


def test_words_outside_the_glossary_keep_their_translation(random_model, monkeypatch):
    answers = iter([[("水手睡觉。", -0.1)], [("船员害怕。", -0.10), ("水手害怕。", -0.12)]])
    _writer(monkeypatch, lambda prompt: next(answers))
    text = "The sailor slept.\n\nThe sailor was afraid."
    answer = perform_long(*random_model, TASK, [text])[0]
    assert answer.text == "水手睡觉。\n\n水手害怕。"


def test_documents_are_translated_side_by_side(random_model, monkeypatch):
    prompts = _writer(monkeypatch, lambda prompt: [(_last(prompt).upper(), -1.0)])
    texts = ["A one. A two.\n\nA three.", "B one.\n\nB two. B three.", "C one.\n\nC two."]
    answers = perform_long(*random_model, TASK, texts, options=LongOptions(group=1), batch=2)
    assert [list(map(_last, batch)) for batch in prompts] == [
        ["A one.", "B one."],
        ["A two.", "B two."],
        ["A three.", "B three."],
        ["C one."],
        ["C two."],
    ]
    assert [answer.text for answer in answers] == [text.upper() for text in texts]
    prompts.clear()
    options = LongOptions(previous=0)
    perform_long(*random_model, TASK, [(texts[0] + "\n\n") * 3], options=options, batch=4)
    # Without groups before them, those of one document share a batch.
    assert list(map(len, prompts)) == [4, 4, 1]


def test_a_sentence_longer_than_the_context_is_broken_and_noted(random_model, monkeypatch, text_of):
    _writer(monkeypatch, lambda prompt: [(_last(prompt), -1.0)])
    sentence = "The " + ", ".join(["whale swam north and the captain slept"] * 60) + "."
    answer = perform_long(*random_model, TASK, [f"A sea.\n\n{sentence}"])[0]
    assert " ".join(answer.text.split()) == f"A sea. {sentence}"
    groups = answer.work.paragraphs[1].groups
    assert groups > 3 and f"{groups} of {groups + 1} parts are pieces of" in answer.work.notes[0]


def test_a_paragraph_that_the_model_leaves_empty_stands_untranslated(random_model, monkeypatch):
    _writer(monkeypatch, lambda prompt: [("", -1.0)])
    answer = perform_long(*random_model, TASK, ["The sea.\n\nThe whale."])[0]
    assert answer.text == "The sea.\n\nThe whale."
    assert "left 2 parts empty" in answer.work.notes[0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "net\t网\nNet\t网络\n", "line 1 translates 'net' as '网', and line 2 as '网络'"),
        ("a.jsonl", '{"source": "a", "target": "b"}\n\n{"source": "a", "target": "c"}', "line 3"),
        ("a.json", '{"a": "b", "a": "c"}', "entry 1 translates 'a' as 'b', and entry 2 as 'c'"),
        ("a.tsv", "net\n", "line 1: a term has a source and a target"),
        ("a.json", "{", "is not valid JSON"),
        ("a.json", "5", "it holds neither a list nor an object"),
        ("a.json", '[{"source": 3, "target": "b"}]', "entry 1: source and target must be texts"),
        ("a.tsv", "\n", "holds no terms"),
        ("a.csv", "a,b", "unknown suffix"),
    ],
)
def test_a_glossary_that_contradicts_itself_is_refused(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_glossary(path)
    assert "\n" not in str(error.value)


def test_glossaries_of_all_formats_are_equal(tmp_path):
    files = {
        "a.tsv": "source\ttarget\nnetwork card\t网卡\nnetwork\t网络\nnetwork\t网络\n",
        "a.jsonl": '{"source": "network card", "target": "网卡"}\n'
        '{"source": "network", "target": "网络"}\n',
        "a.json": '{"network card": "网卡", "network": "网络"}',
        "b.json": '[{"source": "network card", "target": "网卡"}, '
        '{"source": "network", "target": "网络"}]',
    }
    terms = (Term("network card", "网卡"), Term("network", "网络"))
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        assert read_glossary(tmp_path / name) == terms
    assert terms_in("Two Network cards.", terms) == [terms[0]]
    assert terms_in("A network of network cards.", terms) == list(terms)
    assert terms_in("networking", terms) == []
    assert terms_in("一张网卡", (Term("网卡", "network card"),)) != []


def test_the_memory_is_dices_coefficient():
    memory = TermMemory()
    assert memory.consistency("sailor", "水手") is None
    memory.add("The sailor slept", "水手睡觉")
    memory.add("The sailor was afraid", "水手害怕")
    memory.add("The ocean", "大海")
    # "sailor" twice, 水手 twice, both twice: 1. 睡觉 once: 2 / 3.
    assert memory.consistency("a sailor", "水手来了") == 1
    assert memory.consistency("a sailor", "他在睡觉") == pytest.approx(2 / 3)
    assert memory.consistency("a sailor", "船员") == 0


def _brute_force(ours, theirs, ratio):
    """Return the least cost of all ways to align, by trying them."""
    if not ours and not theirs:
        return 0.0
    costs = []
    for m, n in itertools.product(range(3), range(3)):
        if (
            (m, n) in ((1, 1), (1, 0), (0, 1), (2, 1), (1, 2))
            and m <= len(ours)
            and n <= len(theirs)
        ):
            rest = _brute_force(ours[m:], theirs[n:], ratio)
            costs.append(rest + bead_cost(ours[:m], theirs[:n], ratio))
    return min(costs)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [([100, 40, 60, 80], [100, 100, 80]), ([10, 200, 90], [10, 100, 100, 92, 5]), ([50], [])],
)
def test_paragraphs_are_aligned_by_length_as_by_brute_force(ours, theirs):
    beads = align(ours, theirs)
    assert [i for some, _ in beads for i in some] == list(range(len(ours)))
    assert [j for _, some in beads for j in some] == list(range(len(theirs)))
    ratio = max(1, sum(theirs)) / sum(ours)
    cost = sum(
        bead_cost([ours[i] for i in some], [theirs[j] for j in others], ratio)
        for some, others in beads
    )
    assert cost == pytest.approx(_brute_force(ours, theirs, ratio))


def test_a_reference_with_other_paragraphs_is_aligned():
    texts = ["a whale swam " * 9, "no", "the captain slept " * 8]
    paragraphs = [Paragraph(0, 0, text.strip(), 1) for text in texts]
    found = with_reference(paragraphs, f"{texts[0]}\n\n{texts[2]}")
    assert [(each.ours, each.theirs) for each in found.paragraphs] in (
        [((1,), (1,)), ((2,), ()), ((3,), (2,))],
        [((1, 2), (1,)), ((3,), (2,))],
        [((1,), (1,)), ((2, 3), (2,))],
    )
    assert found.chrf > 90
