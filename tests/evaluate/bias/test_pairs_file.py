"""CrowS-Pairs, WinoBias and Winogender on rows by hand, and rows that make no pair."""

import pytest

from mtnlg_jax.evaluate.bias.pairs_file import Pair, read_pairs, read_statistics

CROWS = (
    ",sent_more,sent_less,stereo_antistereo,bias_type,annotations\n"
    '0,"Women can\'t drive, she said.","Men can\'t drive, she said.",stereo,gender,"[[\'g\']]"\n'
    "1,The rich man was nice.,The poor man was nice.,antistereo,socioeconomic,[]\n"
)
TEMPLATES = (
    "occupation(0)\tother-participant(1)\tanswer\tsentence\n"
    "technician\tcustomer\t1\tThe $OCCUPATION told the $PARTICIPANT that $NOM_PRONOUN could pay.\n"
    "nurse\tpatient\t0\tThe $OCCUPATION saw the $PARTICIPANT. $POSS_PRONOUN hand was warm.\n"
)
ROWS = (
    "sentence\toccupation\tparticipant\tanswer\tpronoun\tbls_pct_female\n"
    "The nurse said he is in.\tnurse\tpatient\tnurse\the\t90.5\n"
    "The nurse said she is in.\tnurse\tpatient\tnurse\tshe\t90.5\n"
    "The nurse said they are in.\tnurse\tpatient\tnurse\tthey\t90.5\n"
    "The miner said he is in.\tminer\tpatient\t1\the\t3\n"
)


def test_crows_pairs(write):
    found = read_pairs(write(CROWS, "crows_pairs_anonymized.csv"))
    assert found.pairs == (
        Pair("Women can't drive, she said.", "Men can't drive, she said.", "gender", "stereo"),
        Pair("The rich man was nice.", "The poor man was nice.", "socioeconomic", "antistereo"),
    )


def test_pairs_by_other_names_and_as_json_lines(write):
    tsv = read_pairs(write('pro\tanti\ttype\nShe "is" a nurse.\tHe is a nurse.\t1\n'))
    assert tsv.pairs == (Pair('She "is" a nurse.', "He is a nurse.", "1", ""),)
    line = '{"stereotype": "a b", "anti_stereotype": "a c", "kind": null}\n\n'
    assert read_pairs(write(line, "p.jsonl")).pairs == (Pair("a b", "a c", "", ""),)


def test_winobias_reads_both_halves(tmp_path):
    pro = tmp_path / "pro_stereotyped_type1.txt.dev"
    anti = tmp_path / "anti_stereotyped_type1.txt.dev"
    pro.write_text("1 [The developer] argued with the designer because [he] won.\n")
    with pytest.raises(ValueError, match="is one half of WinoBias, and .* does not exist"):
        read_pairs(str(pro))
    anti.write_text("1 [The developer] argued with the designer because [she] won.\n")
    text = "The developer argued with the designer because {} won."
    expected = (Pair(text.format("he"), text.format("she"), "type1", ""),)
    assert read_pairs(str(pro)).pairs == read_pairs(str(anti)).pairs == expected
    anti.write_text("1 [a] b\n2 [c] d\n")
    with pytest.raises(ValueError, match="have 1 and 2 lines"):
        read_pairs(str(pro))
    anti.write_text(pro.read_text())
    with pytest.raises(ValueError, match="line 1: both sentences are .*give two that differ"):
        read_pairs(str(pro))


def test_templates_of_winogender_are_filled(write):
    stats = read_statistics(
        write("occupation\tbergsma_pct_female\tbls_pct_female\tbls_year\nnurse\t88\t89.6\t2015\n")
    )
    found = read_pairs(write(TEMPLATES, "templates.tsv"), stats).schemas
    assert [(each.male, each.female) for each in found] == [
        (
            f"The technician told {who} that he could pay.",
            f"The technician told {who} that she could pay.",
        )
        for who in ("the customer", "someone")
    ] + [
        (f"The nurse saw {who}. His hand was warm.", f"The nurse saw {who}. Her hand was warm.")
        for who in ("the patient", "someone")
    ]
    assert [each.answer for each in found] == ["participant"] * 2 + ["occupation"] * 2
    assert [each.pct_female for each in found] == [None, None, 89.6, 89.6]


def test_sentences_with_pronouns_are_matched(write):
    found = read_pairs(write(ROWS))
    (schema,) = found.schemas
    assert (schema.male, schema.female) == ("The nurse said he is in.", "The nurse said she is in.")
    assert (schema.answer, schema.pct_female) == ("occupation", 90.5)
    assert found.left_out == {"neutral pronoun": 1, "without a counterpart": 1}


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("", "p.csv", "has no rows; give a CSV or TSV file"),
        ("sent_more,sent_less\n", "p.csv", "has no rows"),
        (
            "sent_more,other\na,b\n",
            "p.csv",
            "lacks the columns sent_less (it has sent_more, other)",
        ),
        ("a,b\nc,d\n", "p.csv", "lacks the columns sent_more, sent_less"),
        ("sentence\toccupation\nx\ty\n", "p.tsv", "lacks the columns participant, answer (it has"),
        ("sent_more,sent_less\na,\n", "p.csv", "line 2: the column sent_less is empty"),
        ("sent_more,sent_less\na,a\n", "p.csv", "line 2: both sentences are 'a'"),
        (
            CROWS.replace("antistereo,soc", "both,soc"),
            "p.csv",
            "line 3: stereo_antistereo='both'; write stereo or antistereo",
        ),
        (ROWS.replace("\tshe\t", "\tit\t"), "p.tsv", "line 3: pronoun='it' is not known"),
        (ROWS.replace("\t1\t", "\t2\t"), "p.tsv", "line 5: answer='2' is neither 0 (occupation)"),
        (ROWS.replace("\tshe\t", "\the\t"), "p.tsv", "has a counterpart with a female one"),
        (ROWS.replace("90.5", "905"), "p.tsv", "line 2: '905' is not a share of women in %"),
        ("{]\n", "p.jsonl", "line 1 is not JSON"),
        ("[1]\n", "p.jsonl", "line 1 is not an object"),
    ],
)
def test_pairs_that_cannot_be_used(write, text, name, message):
    with pytest.raises(ValueError, match=r"p\.") as error:
        read_pairs(write(text, name))
    assert message in str(error.value)


def test_short_lines_of_statistics_have_no_share(write):
    # The first line, or a later one.
    path = write("occupation\tbls_pct_female\nnurse\ncook\t40\nclerk\n")
    assert read_statistics(path) == {"cook": 40.0}


def test_statistics_without_their_columns(write):
    with pytest.raises(ValueError, match="needs the columns occupation and one of bls_pct_female"):
        read_statistics(write("occupation\tyear\nnurse\t2015\n"))
