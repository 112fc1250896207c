"""Write out elements of HTML whose bare text would change the meaning, before text is extracted.

- Exponents and indices: 10⁶, H₂O, xⁿ⁺¹ where Unicode has all characters, else x^k, x_{ij}. Ordinals
  (1st), marks (TM) and notes ([3]) stay as they are.
- Formulas, once each, in whatever form (MathML, MediaWiki, KaTeX, MathJax, images with a text):
  their LaTeX as \\(...\\) or \\[...\\], else MathML written on one line: (a+b)/2, √(x).
- Code (pre): its line ends and empty lines. Readings (ruby): 漢(かん).
- Entities that the page shows, as &amp;lt; shows &lt;, are not resolved again.
"""

import re

# Only pages with such elements are changed; all others are extracted unchanged.
NEEDED = re.compile(
    r"<(?:su[bp]|math|pre|ruby|img|mjx-)\b|<script[^>]{1,80}math/|&amp;#?\w{1,24};", re.IGNORECASE
)
# Linear B letters, which no page contains, stand for characters that extraction would change.
_LINE, _SPACE, _TAB, _AND = "\U00010080\U00010081\U00010082\U00010083"
_KEPT = {_LINE: "\n", _SPACE: " ", _TAB: "\t", _AND: "&"}
_ENTITY = re.compile(r"&(?=#?\w{1,24};)")

_SUPERSCRIPTS = str.maketrans("0123456789+-−=()n", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁼⁽⁾ⁿ")
_SUBSCRIPTS = str.maketrans("0123456789+-−=()", "₀₁₂₃₄₅₆₇₈₉₊₋₋₌₍₎")
_PLAIN = re.compile(
    r"(?:st|nd|rd|th|o|a|os|as|er|re|e|è?me|TM|SM|[MD]lle|[^\w+=−-]*|\[.*\]|"
    r".*\s.*|.{25,})",
    re.DOTALL,
)
_SCRIPTS = {"msup", "msub", "msubsup", "mfrac", "mroot", "mover", "munder", "munderover"}
# Classes and tags.
_FORMULA_BOXES = {
    "mwe-math-element",
    "katex-display",
    "katex",
    "MathJax",
    "MathJax_Display",
    "mjx-container",
}
_FORMULA_IMAGE = re.compile(
    r"\b(?:mwe-math\S*|tex|latex|math|formula|equation)\b|codecogs|"
    r"mathtex|latex\.php",
    re.IGNORECASE,
)


# Characters that references such as &#8; put into a tree and that lxml then refuses.
_NOT_XML = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")


def write_out(tree) -> None:
    """Change the tree of lxml in place; `restore` is for the text extracted from it."""
    for part in tree.iter():
        if isinstance(part.tag, str) and part.text and _NOT_XML.search(part.text):
            part.text = _NOT_XML.sub(" ", part.text)
        if part.tail and _NOT_XML.search(part.tail):
            part.tail = _NOT_XML.sub(" ", part.tail)
    for element in tree.xpath("//math|//*[local-name()='math']"):
        if element.getroottree().getroot() is tree:  # not in a formula that is replaced already
            _replace(_box_of(element), _formula(element))
    for element in tree.xpath("//script[starts-with(@type, 'math/')]"):
        while _is_preview(before := element.getprevious()):
            before.drop_tree()
        _replace(element, _tex(element.text or "", "mode=display" in element.get("type")))
    for element in tree.xpath("//img[@alt]"):
        if _FORMULA_IMAGE.search(f"{element.get('class', '')} {element.get('src', '')}"):
            _replace(element, _tex(element.get("alt"), False))
    for element in reversed(tree.xpath("//sup|//sub")):
        _replace(element, _shifted(element))
    for element in tree.xpath("//ruby"):
        for part in element.xpath(".//rp"):
            part.drop_tree()
        for part in element.xpath(".//rt"):
            _replace(part, f"({part.text_content().strip()})")
    for element in tree.xpath("//pre"):
        for part in element.xpath(".//br"):
            _replace(part, "\n")
        _change_text(element, _keep_lines)
    _change_text(tree, lambda text: _ENTITY.sub(_AND, text))


def _is_preview(element) -> bool:
    """Whether an element previews the formula of the script that follows it."""
    if element is None or (element.tail or "").strip():
        return False
    return "MathJax" in element.get("class", "")


def restore(text: str) -> str:
    """Put back the characters that `write_out` protected from extraction."""
    for mark, kept in _KEPT.items():
        text = text.replace(mark, kept)
    return text


def _keep_lines(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\n", _LINE).replace("\t", _TAB)
    return re.sub(f"(?<=[ {_LINE}]) | (?= )", _SPACE, text)


def _change_text(element, change) -> None:
    for part in element.iter():
        if part.text and isinstance(part.tag, str):
            part.text = change(part.text)
        if part.tail and part is not element:
            part.tail = change(part.tail)


def _replace(element, text: str) -> None:
    if element.getparent() is not None:
        element.tail = text + (element.tail or "")
        element.drop_tree()


def _shifted(element) -> str:
    text = element.text_content()
    stripped = text.strip()
    if any((link.get("href") or "").startswith("#") for link in element.iter("a")):
        return stripped if stripped.startswith("[") else f"[{stripped}]"
    raised = element.tag == "sup"
    if not stripped or raised and _PLAIN.fullmatch(stripped) or len(stripped) > 40:
        return text
    return _raise(stripped) if raised else _lower(stripped)


def _raise(text: str) -> str:
    raised = text.translate(_SUPERSCRIPTS)
    return raised if not set(raised) & set(text) else _mark("^", text)


def _lower(text: str) -> str:
    lowered = text.translate(_SUBSCRIPTS)
    return lowered if not set(lowered) & set(text) else _mark("_", text)


def _mark(mark: str, text: str) -> str:
    return f"{mark}{text}" if len(text) == 1 else f"{mark}{{{text}}}"


def _box_of(element):
    """Return the outermost element of a formula, which may contain it in several forms."""
    box = element
    for ancestor in element.iterancestors():
        names = {ancestor.tag, *ancestor.get("class", "").split()}
        if names & _FORMULA_BOXES:
            box = ancestor
    return box


def _formula(math) -> str:
    block = math.get("display") == "block"
    for note in math.iter():
        if _name(note) == "annotation" and "tex" in note.get("encoding", "").lower() and note.text:
            return _tex(note.text, block)
    if math.get("alttext"):
        return _tex(math.get("alttext"), block)
    return re.sub(r"\s+", " ", _in_a_line(math)).strip().rstrip(";")


def _tex(source: str, block: bool) -> str:
    source = _NOT_XML.sub(" ", source).strip()
    if match := re.fullmatch(r"\{\\(?:displaystyle|textstyle) (.*)\}", source, re.DOTALL):
        source = match[1].strip()
    source = source.strip("$").strip()
    if not re.search(r"[\\^_{}]", source):
        return source
    return rf"\[{source}\]" if block else rf"\({source}\)"


def _name(element) -> str:
    return element.tag.rpartition("}")[2].rpartition(":")[2] if isinstance(element.tag, str) else ""


def _in_a_line(element) -> str:
    """Return presentation MathML as one line of text."""
    name = _name(element)
    parts = [
        _in_a_line(part)
        for part in element
        if _name(part) not in ("annotation", "annotation-xml", "")
    ]
    if name in ("mi", "mn", "mo", "mtext", "ms"):
        own = re.sub(r"\s+", " ", element.text_content()).strip()
        if name == "mtext":
            return f" {own} "
        return "" if own in "\u2061\u2062\u2063\u2064" else own
    if name == "msqrt":
        return f"√{_group(''.join(parts))}"
    if name == "mfenced":
        return element.get("open", "(") + ",".join(parts) + element.get("close", ")")
    if name == "mtr":
        return ", ".join(parts) + ";"
    if name == "mspace":
        return " "
    if len(parts) < 2 or name not in _SCRIPTS:
        return "".join(parts)
    base = parts[0]
    if name == "mfrac":
        return f"{_group(base)}/{_group(parts[1])}"
    if name == "mroot":
        return f"{_raise(parts[1])}√{_group(base)}"
    if name in ("msup", "mover"):
        return base + _raise(parts[1])
    below = base + _lower(parts[1])
    return below + _raise(parts[2]) if len(parts) > 2 else below


def _group(text: str) -> str:
    return text if re.fullmatch(r"\w|\d+", text) else f"({text})"
