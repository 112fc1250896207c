"""Lexicons of both forms, and the errors of those that cannot be used."""

import pytest

from mtnlg_jax.evaluate.bias.lexicon import check_language, read_lexicon, read_words

WORDNET = (
    "# POS\tID\tPosScore\tNegScore\tSynsetTerms\tGloss\n"
    "a\t00001740\t0.125\t0\table#1\thaving means\n"
    "a\t00002098\t0\t0.75\tunable#1 able#2\tnot able\n"
    "n\t00003000\t0\t1\tgloom#1\tdarkness\n"
    "a\t00004000\t0.5\t0.25\twell_off#1 rich#1\twealthy\n"
)


def test_sentiwordnet_weighs_senses_by_their_number(write):
    lexicon = read_lexicon(write(WORDNET, "SentiWordNet_3.0.0.txt"))
    assert lexicon.kind == "sentiwordnet"
    assert lexicon.scores == {
        "able": pytest.approx((0.125 - 0.75 / 2) / 1.5),
        "unable": -0.75,
        "rich": 0.25,
    }
    assert (lexicon.low, lexicon.high) == (-0.75, 0.25)


def test_a_plain_lexicon_has_scores_or_labels(write):
    lexicon = read_lexicon(write("Kind\t2.5\n# a comment\n\nmean\t-1\tgloss\n"))
    assert (lexicon.kind, lexicon.scores) == ("plain", {"kind": 2.5, "mean": -1.0})
    labels = read_lexicon(write("kind\tpositive\nmean\tNegative\ntall\tneutral\n"))
    assert labels.scores == {"kind": 1.0, "mean": -1.0, "tall": 0.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind\tpositive\nnice\tpositive\n", "all 2 words have the score 1, which is one group"),
        ("kind 1\n", "line 1: 'kind 1' is not word<TAB>score; separate the two by a tab"),
        ("kind\t1\nkind\t2\n", "'kind' has the score 2 here and 1 before; keep one"),
        ("kind\tnan\n", "line 1: 'nan' is not a score; give a number"),
        ("# nothing\n", "has no word; give lines of the form"),
        (WORDNET.replace("\na\t", "\nr\t"), "has no adjective"),
        (WORDNET.replace("able#1\t", "able\t"), "line 2: the term 'able' has no number"),
    ],
)
def test_a_lexicon_that_cannot_be_used(write, text, message):
    with pytest.raises(ValueError, match="--lexicon=") as error:
        read_lexicon(write(text))
    assert message in str(error.value)


def test_a_lexicon_that_is_not_utf_8(tmp_path):
    (tmp_path / "latin.tsv").write_bytes(b"gr\xfcn\t1\n")
    with pytest.raises(ValueError, match="is not UTF-8 at byte 2; convert it"):
        read_lexicon(str(tmp_path / "latin.tsv"))


def test_a_list_of_words(write):
    assert read_words(write("Kind\nmean\t3\nkind\n")) == ["kind", "mean"]
    with pytest.raises(ValueError, match="has 1 words, and words are compared"):
        read_words(write("kind\n"))


def test_the_script_of_a_lexicon_is_that_of_the_prompts():
    check_language(["善良", "kind"], "zh", "--lexicon=x")
    with pytest.raises(ValueError, match="none of the 1 words is Chinese, such as 'kind'"):
        check_language(["kind"], "zh", "--lexicon=x")
    with pytest.raises(ValueError, match="of a script with spaces, such as '善良'"):
        check_language(["善良"], "en", "--lexicon=x")
