"""Check how texts are normalized, cleaned and cut."""

import numpy as np
import pytest

from mtnlg_jax.tasks.text import clean, cut, normalize


@pytest.mark.parametrize(
    ("written", "language", "handed_in"),
    [
        ("  two   words\t", "en", "two words"),
        ("cafe\u0301 \x00is\ufffd open", "en", "caf\u00e9 is open"),
        ("\u2581Hello\u2581world", "en", "Hello world"),
        ("un ##believ ##able , ver@@ y", "en", "unbelievable, very"),
        ("do n't go , it 's ( really ) bad !", "en", "don't go, it's (really) bad!"),
        ('He said "go" .', "en", 'He said "go".'),
        ("at .5 or 3.14, see a.b/c,d", "en", "at .5 or 3.14, see a.b/c,d"),
        ("ＡＢ１２，yes。no", "en", "AB12, yes. no"),
        ("Good!! Bad,, fine..... end", "en", "Good! Bad, fine... end"),
        ("std::cout << x", "en", "std::cout << x"),
        ("Good film. Bad end. good  film!", "en", "Good film. Bad end."),
        ("One. Two. One. Three.", "en", "One. Two. Three."),
        ("... and ...", "en", "... and..."),
        ("我 喜欢 这 部 电影 , 真的 .", "zh", "我喜欢这部电影，真的。"),
        ("价格是3,000元,圆周率是3.14.", "zh", "价格是3,000元，圆周率是3.14."),
        ("一共,3个", "zh", "一共，3个"),
        ("时间:10:30,网站a.com", "zh", "时间:10:30，网站a.com"),
        ("他说 ： “ 你好 ！！ ” 。", "zh", "他说：“你好！”。"),
        ("很好。真的很好。很好！", "zh", "很好。真的很好。"),
        ("用 Python 写", "zh", "用 Python 写"),
        ("", "en", ""),
    ],
)
def test_clean(written, language, handed_in):
    assert clean(written, language) == handed_in
    assert clean(handed_in, language) == handed_in, "cleaning is idempotent"


def test_clean_cuts_at_stops_and_keeps_joined_texts():
    assert clean(" a whale\nReview: b", "en", ("\n",)) == "a whale"
    assert clean("a END b\nc", "en", ("\n", " END")) == "a"
    joined = clean(' said no. "No."\n\nNo. Then  yes. No. \n', "en", joined=True)
    assert joined == ' said no. "No."\n\nThen  yes. No.', (
        "white space is kept; of equal sentences in a row, one is kept"
    )


def test_normalize():
    assert normalize(" e\u0301\r\n\x07b\u200b  c ") == "\u00e9 b c"
    assert normalize("\n\n  a\r\n b \n", lines=True) == "  a\n b"


def test_cut_keeps_whole_sentences():
    text = "First is here. Second is here. Third is here. Last is here."

    def at_most(size):
        return lambda part: len(part) <= size

    assert cut(text, "start", at_most(100)) == text
    assert cut(text, "start", at_most(31)) == "First is here. Second is here."
    assert cut(text, "end", at_most(30)) == "Third is here. Last is here."
    assert cut(text, "both", at_most(32)) == "First is here. … Last is here."
    assert cut(text, "start", at_most(8)) == "First is", "words, if no sentence fits"
    assert cut(text, "end", at_most(8)) == "is here."
    assert cut("天地玄黄宇宙洪荒", "start", at_most(3)) == "天地玄"
    assert cut(text, "start", at_most(2)) == ""
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = "".join(rng.choice(["word", "好", " ", ". ", "。", "\n", "x"], rng.integers(1, 60)))
        size = int(rng.integers(1, 40))
        for keep in ("start", "end", "both"):
            part = cut(text, keep, at_most(size))
            assert len(part) <= size
            assert keep == "both" or (
                text.startswith(part) if keep == "start" else text.endswith(part)
            )
