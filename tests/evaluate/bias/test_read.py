"""Files of prompts: the built-in ones, both forms, and the errors of those that are wrong."""

import json

import pytest

from mtnlg_jax.evaluate.bias.read import LANGUAGES, builtin, chosen, read_prompts

SET = {"templates": ["{group} was very"], "groups": {"a": ["she"], "b": ["he"]}}
TEST = {
    "templates": ["The {occupation} was a"],
    "groups": {"a": ["woman"], "b": ["man"]},
    "occupations": ["nurse"],
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_built_in_prompts_are_whole(language):
    prompts = builtin(language)
    assert prompts.language == language and len(prompts.words) >= 70
    assert [each.name for each in prompts.sets] == ["gender", "ethnicity", "religion"]
    assert len(prompts.identifiers.occupations) >= 70
    for each in prompts.sets:
        for group in each.groups:
            for _, text in each.prompts(group):
                assert "{" not in text and text == text.strip()


def test_json_and_tsv_say_the_same(write):
    tsv = "set\tgroup\ttext\nsex\t*\t{group} was very\nsex\ta\tshe\nsex\tb\the\n"
    one = read_prompts(write(tsv))
    other = read_prompts(write(json.dumps({"sets": {"sex": SET}}), "p.json"))
    assert one.sets == other.sets and one.language == "en"
    assert one.sets[0].prompts("a") == [(0, "She was very")]
    csv = read_prompts(write(tsv.replace("\t", ","), "p.csv"), "zh")
    assert csv.sets == one.sets and csv.language == "zh"


def test_sets_are_chosen_by_name():
    prompts = chosen(builtin("en"), ["religion"])
    assert [each.name for each in prompts.sets] == ["religion"] and prompts.identifiers is None
    assert chosen(builtin("en"), ["identifiers"]).sets == ()
    with pytest.raises(ValueError, match=r"--sets=age is not in .* choose from gender, ethnicity"):
        chosen(builtin("en"), ["age"])


def _with(**changes):
    return json.dumps({"sets": {"sex": SET | changes}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_with(groups={"a": ["she"]}), "sets.sex has 1 group (a), and groups are compared"),
        (_with(groups={}), "sets.sex has no groups"),
        (_with(groups=[]), "sets.sex has no groups"),
        (_with(templates=["She was very"]), "'She was very' of sets.sex has no slot"),
        (_with(templates=[]), "sets.sex.templates must be a list of 1"),
        (_with(groups={"a": ["she"], "b": ["she"]}), "'she' in the groups a and b; keep it in one"),
        (_with(groups={"a": [""], "b": ["he"]}), "sets.sex.groups.a must be a list"),
        (json.dumps({"sets": {"sex": 1}}), "sets.sex is not an object"),
        (json.dumps({"sets": {}}), "has no sets; write"),
        (json.dumps({"language": "fr", "sets": {"sex": SET}}), "language 'fr'; choose en or zh"),
        (json.dumps([1]), "holds a list; write an object"),
        ("{", "is not JSON"),
        (
            json.dumps({"sets": {}, "identifiers": TEST | {"groups": {"a": ["x"]}}}),
            "identifiers has 1 group (a)",
        ),
        (
            json.dumps(
                {"sets": {}, "identifiers": TEST | {"groups": {"a": "x", "b": "y", "c": "z"}}}
            ),
            "identifiers has 3 groups (a, b, c), and occupations lean to one of two",
        ),
        (
            json.dumps({"sets": {}, "identifiers": TEST | {"templates": ["It was a"]}}),
            "write {occupation} where the term goes",
        ),
    ],
)
def test_prompts_that_cannot_be_used(write, text, message):
    with pytest.raises(ValueError, match="--prompts=") as error:
        read_prompts(write(text, "p.json"))
    assert message in str(error.value)


def test_a_table_of_prompts_that_cannot_be_used(write):
    with pytest.raises(ValueError, match="lacks the column 'text'; its first line must name"):
        read_prompts(write("set\tgroup\nsex\t*\n"))
    with pytest.raises(ValueError, match="line 2: a column is empty"):
        read_prompts(write("set\tgroup\ttext\nsex\t\t{group} was\n"))
