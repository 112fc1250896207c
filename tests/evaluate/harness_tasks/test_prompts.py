"""Prompts of each task on hand-made rows of every known layout, and scores counted by hand."""

import pytest

from mtnlg_jax.evaluate.harness_tasks import loading, run

# task -> (file, rows of several layouts, [(context, continuations)] of each)
CASES = {
    "lambada_openai": (
        "lambada_test.jsonl",
        [
            {"text": "The whale swam north. Nobody saw the whale"},
            {"context": "He sold the\nboat. He missed the ", "continuation": "boat"},
        ],
        [
            ("The whale swam north. Nobody saw the", [" whale"]),
            ("He sold the\nboat. He missed the", [" boat"]),
        ],
    ),
    "lambada_openai_cloze": (
        "lambada_openai.jsonl",
        [{"context": "She fed the cat. Then slept the", "continuation": "cat"}],
        [("She fed the cat. Then slept the ____. ->", [" cat"])],
    ),
    "boolq": (
        "boolq/dev.jsonl",
        [
            {"passage": "Ice floats.", "question": "does ice float", "answer": True},
            {"passage": "Ice floats.", "question": "does ice sink", "label": 0},
            {
                "query": "Passage: Ice floats.\nQuestion: does ice melt?\n",
                "choices": ["no", "yes"],
                "gold": 1,
            },
        ],
        [
            (f"Ice floats.\nQuestion: does ice {verb}?\nAnswer:", [" no", " yes"])
            for verb in ("float", "sink", "melt")
        ],
    ),
    "piqa": (
        "piqa_valid.jsonl",
        [
            {"goal": "To cool tea", "sol1": "wait", "sol2": "boil it", "label": 0},
            {"query": "Question: To dry hands", "choices": ["wet them", "use a towel"], "gold": 1},
        ],
        [
            ("Question: To cool tea\nAnswer:", [" wait", " boil it"]),
            ("Question: To dry hands\nAnswer:", [" wet them", " use a towel"]),
        ],
    ),
    "hellaswag": (
        "hellaswag/validation.jsonl",
        [
            {
                "activity_label": "Baking bread",
                "ctx_a": "A man kneads dough.",
                "ctx_b": "he",
                "endings": ["bakes it.", "flies [substeps]away."],
                "label": "0",
            },
            {
                "activity_label": "Rowing",
                "ctx": "A girl rows. She",
                "endings": ["rests.", "sings.", "sinks."],
                "label": 2,
            },
            {"query": "Chess: He moves. He", "choices": ["wins.", "eats."], "gold": 1},
        ],
        [
            ("Baking bread: A man kneads dough. He", [" bakes it.", " flies away."]),
            ("Rowing: A girl rows. She", [" rests.", " sings.", " sinks."]),
            ("Chess: He moves. He", [" wins.", " eats."]),
        ],
    ),
    "anli_r2": (
        "anli_v1.0/R2/dev.jsonl",
        [
            {"context": "It rained.", "hypothesis": "It was wet.", "label": "e"},
            {"premise": "It rained.", "hypothesis": "It was Monday.", "label": 1},
            {"premise": "It rained.", "hypothesis": "It was dry.", "label": "contradiction"},
            {"premise": "It rained.", "hypothesis": "It was blue.", "label": "n"},
            {"premise": "It rained.", "hypothesis": "It was sunny.", "label": "c"},
        ],
        [
            (
                f"It rained.\nQuestion: It was {what}. True, False, or Neither?\nAnswer:",
                [" True", " Neither", " False"],
            )
            for what in ("wet", "Monday", "dry", "blue", "sunny")
        ],
    ),
    "hans": (
        "heuristics_evaluation_set.jsonl",
        [
            {
                "gold_label": "non-entailment",
                "sentence1": "The doctor saw the actor .",
                "sentence2": "The actor saw the doctor .",
                "heuristic": "lexical_overlap",
                "subcase": "ln_subject/object_swap",
            },
            {"premise": "Dogs bark .", "hypothesis": "Dogs bark .", "label": 0},
        ],
        [
            (
                "The doctor saw the actor .\nQuestion: The actor saw the doctor . True or False?\n"
                "Answer:",
                [" True", " False"],
            ),
            ("Dogs bark .\nQuestion: Dogs bark . True or False?\nAnswer:", [" True", " False"]),
        ],
    ),
    "wic": (
        "WiC/val.jsonl",
        [
            {
                "sentence1": "He ran runs.",
                "sentence2": "A run of luck.",
                "start1": 7,
                "end1": 11,
                "label": False,
            },
            {"word": "bank", "sentence1": "Two banks.", "sentence2": "A bank.", "label": "T"},
            {"word": "art", "sentence1": "Artists sell art.", "sentence2": "Art.", "label": 1},
        ],
        [
            (
                f"Sentence 1: {first}\nSentence 2: {second}\nQuestion: Is the word '{word}' used "
                "in the same way in the two sentences above?\nAnswer:",
                [" no", " yes"],
            )
            for first, second, word in (
                ("He ran runs.", "A run of luck.", "runs"),
                ("Two banks.", "A bank.", "banks"),
                ("Artists sell art.", "Art.", "art"),
            )
        ],
    ),
    "rte": (
        "rte.jsonl",
        [
            {"sentence1": "It rained.", "sentence2": "It was wet.", "label": 0},
            {"premise": "It rained.", "hypothesis": "It froze.", "label": "not_entailment"},
        ],
        [
            (f"It rained.\nQuestion: It {what}. True or False?\nAnswer:", [" True", " False"])
            for what in ("was wet", "froze")
        ],
    ),
    "arc_challenge": (
        "ARC-Challenge/test.jsonl",
        [
            {
                "question": "Which is hot?",
                "choices": {"text": ["ice", "fire"], "label": ["1", "2"]},
                "answerKey": "2",
            },
            {"query": "Question: Which is cold?", "choices": ["ice", "fire"], "gold": 0},
            {
                "question": {
                    "stem": "Which is wet?",
                    "choices": [{"text": "sand", "label": "A"}, {"text": "sea", "label": "B"}],
                },
                "answerKey": "B",
            },
        ],
        [
            ("Question: Which is hot?\nAnswer:", [" ice", " fire"]),
            ("Question: Which is cold?\nAnswer:", [" ice", " fire"]),
            ("Question: Which is wet?\nAnswer:", [" sand", " sea"]),
        ],
    ),
    "openbookqa": (
        "openbook_qa.jsonl",
        [
            {"query": "Plants need", "choices": ["light", "noise"], "gold": 0},
            {
                "question_stem": "Fish need",
                "choices": {"text": ["water", "wings"], "label": ["A", "B"]},
                "answerKey": "A",
            },
        ],
        [("Plants need", [" light", " noise"]), ("Fish need", [" water", " wings"])],
    ),
    "copa": (
        "copa.jsonl",
        [
            {"query": "He fell, because", "choices": ["it was icy.", "he sang."], "gold": 0},
            {
                "premise": "It rained.",
                "question": "effect",
                "choice1": "We got wet.",
                "choice2": "We flew.",
                "label": 0,
            },
        ],
        # Two spaces: the stock prompt has one in its choices and one between.
        [
            ("He fell because", ["  it was icy.", "  he sang."]),
            ("It rained therefore", ["  we got wet.", "  we flew."]),
        ],
    ),
}
# Which of the choices is right, in the order of the rows above.
RIGHT = {
    "boolq": [1, 0, 1],
    "piqa": [0, 1],
    "hellaswag": [0, 2, 1],
    "anli_r2": [0, 1, 2, 1, 2],
    "hans": [1, 0],
    "wic": [0, 1, 1],
    "rte": [0, 1],
    "arc_challenge": [1, 0, 1],
    "openbookqa": [0, 0],
    "copa": [0, 0],
}


@pytest.mark.parametrize("name", CASES)
def test_the_prompts_of_every_layout(known, rows_of, name):
    file, rows, expected = CASES[name]
    model = known(lambda context, continuation: -float(len(continuation)))
    run.run_tasks(model, [name], task_data=rows_of(file, rows), bootstraps=0)
    requests = [(context, each) for context, parts in expected for each in parts]
    assert model.seen == requests


@pytest.mark.parametrize("name", RIGHT)
def test_a_model_that_knows_all_but_the_first_row(known, rows_of, name):
    """The labels of every layout: the score is that of a model that errs in the first row."""
    file, rows, expected = CASES[name]
    count = len(rows)
    right = dict(zip((context for context, _ in expected), RIGHT[name], strict=True))
    choices = dict(expected)

    def score(context, continuation):
        best = right[context]
        if context == expected[0][0]:
            best = 1 - best
        return -1.0 if continuation == choices[context][best] else -30.0

    results = run.run_tasks(known(score), [name], task_data=rows_of(file, rows))
    task = results["tasks"][name]
    assert task["metrics"]["acc"]["value"] == pytest.approx((count - 1) / count)
    share = (count - 1) / count
    # The standard error of a mean of zeros and ones, counted by hand.
    error = (share * (1 - share) / (count - 1)) ** 0.5
    assert task["metrics"]["acc"]["stderr"] == pytest.approx(error)
    assert task["per_row"]["acc"] == [0] + [1] * (count - 1)


def test_winogrande_by_partial_evaluation(known, rows_of):
    rows = [
        {"sentence": "Sam beat Tom, so _ won.", "option1": "Sam", "option2": "Tom", "answer": "1"},
        {
            "context_options": ["Ann met Amy. Ann", "Ann met Amy. Amy"],
            "continuation": "smiled.",
            "gold": 1,
        },
    ]

    def score(context, continuation):
        return -1.0 if context.endswith(("Sam", "Ann")) else -2.0

    model = known(score)
    task = run.run_tasks(model, ["winogrande"], task_data=rows_of("winogrande_xl_dev.jsonl", rows))
    assert model.seen == [
        ("Sam beat Tom, so Sam", " won."),
        ("Sam beat Tom, so Tom", " won."),
        ("Ann met Amy. Ann", " smiled."),
        ("Ann met Amy. Amy", " smiled."),
    ]
    found = task["tasks"]["winogrande"]
    assert found["metrics"]["acc"]["value"] == 0.5
    assert found["predicted_classes"] == {"1": 1.0, "2": 0.0}
    assert found["target_classes"] == {"1": 0.5, "2": 0.5}


ARTICLE = {"article": "Eva grew beans. They were green."}
QUESTIONS = [
    {"question": "Who grew beans?", "options": ["Eva", "Tom", "Ann", "Bob"], "answer": "A"},
    {"question": "They were  _  .", "options": ["red", "blue", "green", "black"], "answer": "C"},
    {"question": "Who is it about?", "options": ["Bob", "Eva", "Ann", "Tom"], "answer": "B"},
]


@pytest.mark.parametrize(
    "rows",
    [
        [ARTICLE | {"problems": repr(QUESTIONS)}],
        [ARTICLE | {"problems": QUESTIONS}],
        [ARTICLE | question for question in QUESTIONS],
        [
            ARTICLE
            | {
                "questions": [each["question"] for each in QUESTIONS],
                "options": [each["options"] for each in QUESTIONS],
                "answers": [each["answer"] for each in QUESTIONS],
            }
        ],
    ],
    ids=["text", "list", "a row a question", "a file an article"],
)
def test_race_in_each_layout(known, rows_of, rows):
    model = known(lambda context, continuation: -float(continuation != " Eva"))
    folder = rows_of("race/high/test.jsonl", rows)
    task = run.run_tasks(model, ["race"], task_data=folder)["tasks"]["race"]
    contexts = {context for context, _ in model.seen}
    assert contexts == {
        "Article: Eva grew beans. They were green.\n\nQuestion: Who grew beans?\nAnswer: Eva\n"
        "They were green\nWho is it about?"
    }
    assert [continuation for _, continuation in model.seen] == [" Bob", " Eva", " Ann", " Tom"]
    assert task["metrics"]["acc"]["value"] == 1.0 and task["rows"] == 1


def test_lambada_counts_greedy_words_and_perplexity(known, rows_of):
    import math

    rows = [{"text": f"one two {word}"} for word in ("a", "b", "c", "d")]
    values = {" a": (-1.0, True), " b": (-2.0, False), " c": (-3.0, True), " d": (-6.0, False)}
    model = known(lambda context, continuation: values[continuation])
    folder = rows_of("lambada.jsonl", rows)
    results = run.run_tasks(model, ["lambada_openai"], task_data=folder, bootstraps=2000)
    metrics = results["tasks"]["lambada_openai"]["metrics"]
    assert metrics["acc"]["value"] == 0.5
    assert metrics["perplexity"]["value"] == pytest.approx(math.exp(3.0))
    assert metrics["perplexity"]["stderr"] > 0 and not metrics["perplexity"]["higher_is_better"]


def test_acc_norm_divides_by_characters(known, rows_of):
    rows = [{"goal": "g", "sol1": "ab", "sol2": "abcdefgh", "label": 1}]
    values = {" ab": -4.0, " abcdefgh": -8.0}  # by character: -2 and -1
    folder = rows_of("piqa.jsonl", rows)
    results = run.run_tasks(known(lambda _, each: values[each]), ["piqa"], task_data=folder)
    metrics = results["tasks"]["piqa"]["metrics"]
    assert (metrics["acc"]["value"], metrics["acc_norm"]["value"]) == (0.0, 1.0)


@pytest.mark.parametrize("name", [n for n in loading.own_names() if n not in ("hans",)])
def test_prompts_are_those_of_the_harness(name):
    """Our files of stock names say what the stock files say, apart from where rows come from."""
    from pathlib import Path

    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    stock = {
        "lambada_openai": "lambada/lambada_openai.yaml",
        "lambada_openai_cloze": "lambada_cloze/lambada_openai_cloze.yaml",
        "race": "race/race.yaml",
        "boolq": "super_glue/boolq/default.yaml",
        "piqa": "piqa/piqa.yaml",
        "hellaswag": "hellaswag/hellaswag.yaml",
        "winogrande": "winogrande/default.yaml",
        "wic": "super_glue/wic/default.yaml",
        "rte": "glue/rte/default.yaml",
        "copa": "super_glue/copa/default.yaml",
        "openbookqa": "openbookqa/openbookqa.yaml",
    } | {f"anli_r{n}": f"anli/anli_r{n}.yaml" for n in (1, 2, 3)}
    stock |= {f"arc_{kind}": f"arc/arc_{kind}.yaml" for kind in ("easy", "challenge")}
    theirs = load_yaml(Path(lm_eval.tasks.__file__).parent / stock[name])
    ours = load_yaml(loading.FOLDER / f"{name}.yaml")
    same = ("output_type", "doc_to_text", "doc_to_target", "doc_to_choice", "metric_list")
    for key in (*same, "should_decontaminate", "doc_to_decontamination_query", "process_docs"):
        mine = ours.get(key)
        other = theirs.get(key)
        if callable(mine):
            # Loaded twice, by path and by name.
            mine = mine.__code__.co_code, mine.__name__
            other = other.__code__.co_code, other.__name__
        assert mine == other, key
    assert ours["metadata"]["version"] == theirs["metadata"]["version"]
    splits = ("test_split", "validation_split", "training_split")
    assert [bool(ours.get(key)) for key in splits] == [bool(theirs.get(key)) for key in splits] or (
        name == "lambada_openai_cloze"
    )
