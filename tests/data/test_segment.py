"""Check how text of any script is split into words and sentences."""

from mtnlg_jax.data.segment import language_of, sentences, words


def test_language_of():
    for text, language in (
        ("A whale.", "en"),
        ("一头鲸鱼", "zh"),
        ("iPhone 手机怎么样", "zh"),
        ("", "en"),
        ("the word 好 means good", "en"),
        ("3.14", "en"),
    ):
        assert language_of(text) == language, text


def test_sentences_keep_all_text():
    text = "Mind 3.14! “Yes?” he said\n\n好。真的吗？」对…… end"
    assert "".join(sentences(text)) == text
    assert sentences(text) == [
        "Mind 3.14! ",
        "“Yes?” ",
        "he said\n\n",
        "好。",
        "真的吗？」",
        "对…… ",
        "end",
    ]


def test_words_of_any_script():
    assert words("नमस्ते, दुनिया!") == ["नमस्ते", "दुनिया"], "marks belong to their letters"
    assert words("Don't 3.5 naïve_x ＡＢ日本") == [
        "don",
        "t",
        "3",
        "5",
        "naïve",
        "x",
        "ab",
        "日",
        "本",
    ]
    assert words("กลัง") == ["ก", "ลั", "ง"], (
        "characters of a script without spaces, each with its marks"
    )
