"""Split a text of any script into words and sentences.

English and Chinese ("en", "zh") have their own rules; other languages are treated as English.
`words` splits text in every script.
"""

import re
import unicodedata

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# A sentence with the white space after it, so that all of them joined are the text. "Mr. Smith"
# counts as two.
SENTENCE = re.compile(
    r".+?(?:[。！？…]+[”’」』）】]*"  # the end of a Chinese sentence
    r"|[.!?]+[\"'”’)\]]*(?=\s|\Z)"  # the end of an English one
    r"|(?=\n)|\Z)\s*",
    re.DOTALL,
)
_CHINESE = re.compile(f"[{HAN}]")
WORDS = re.compile(rf"[{HAN}]|(?:(?![{HAN}])\w)+")  # without punctuation

# Scripts without spaces between words: Thai, Lao, Burmese, Khmer, kana, bopomofo, half-width
# katakana.
_UNSPACED = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ece\u1000-\u103f\u1050-\u108f\u1780-\u17b3"
    "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3105-\u312f\u31f0-\u31ff\uff66-\uff9f"
)
UNSPACED = re.compile(f"[{HAN}{_UNSPACED}]")
_JOINERS = "\u200c\u200d"  # used inside words in Indic scripts and Persian


def language_of(text: str) -> str:
    """Return "zh" if Chinese characters outnumber the words of other scripts, else "en"."""
    chinese = len(_CHINESE.findall(text))
    return "zh" if 2 * chinese > len(WORDS.findall(text)) else "en"


def words(text: str) -> list[str]:
    """Return the words of a text in any script, in lower case and without punctuation.

    A word consists of letters and digits with their combining marks. In scripts without spaces
    between words (Han, kana, Thai, Lao, Khmer, Burmese) each character with its marks is a word.
    """
    found: list[str] = []
    # Kind of the previous character: "word", "character" (in a script without spaces), or "" for
    # any other.
    before = ""
    for character in unicodedata.normalize("NFKC", text).casefold():
        kind = unicodedata.category(character)[0]
        if kind == "M" or character in _JOINERS:
            if before:
                found[-1] += character
        elif kind not in "LN":
            before = ""
        elif UNSPACED.match(character):
            found.append(character)
            before = "character"
        elif before == "word":
            found[-1] += character
        else:
            found.append(character)
            before = "word"
    return [word.rstrip(_JOINERS) for word in found]


def sentences(text: str) -> list[str]:
    """Split a text into sentences that include the white space after them."""
    return SENTENCE.findall(text)
