r"""Takes the dress off a short piece of text: TeX, Markdown, HTML and Unicode forms become plain ones.

What is taken off leaves a space where it could join digits: "4\textbf{2}" and "4<b>2</b>" do not become 42.
"""

from __future__ import annotations

import re
import unicodedata

THIN = "\u2009"
"""What every kind of space that may stand between thousands becomes; a plain space may not."""
RANGE = "\u2013"
"""What every long dash becomes."""

TIMES = "\u00d7"
"""What every sign of multiplication becomes but "*", which may be Markdown."""

_VULGAR = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"
_CHARACTERS = str.maketrans(
    {chr(0xFEE0 + code): chr(code) for code in range(0x21, 0x7F)}  # full-width
    | dict.fromkeys("\u2212\ufe63\uff0d\u2796\u2010\u2011", "-")
    | dict.fromkeys("\u2012\u2013\u2014\u2015", RANGE)
    | dict.fromkeys("\u00a0\u2005\u2006\u2007\u2008\u2009\u200a\u202f", THIN)
    | dict.fromkeys("\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufe0f\ufeff", None)
    | dict.fromkeys("\u2715\u2716\u22c5\u00b7\u2219\u2217", TIMES)
    | dict.fromkeys("\u00f7\u2044\u2215", "/")
    | dict.fromkeys("\u2248\u2243\u2245\u2261", "=")
    | dict.fromkeys("\u2192\u21d2\u2234", "=")
    | dict.fromkeys("\u2264\u2265\u2260\u226a\u226b", "<")
    | dict.fromkeys("\uffe5\uffe1€£¥₹₩₽₫₺₪฿", "$")
    | {"\u066b": ".", "\u066c": ",", "\u060c": ","}  # Arabic
    | {"\u00ba": "°", "\u2032": "'", "\u03c0": r"\pi "}
    | {
        character: r" \frac{{{}}}{{{}}} ".format(*unicodedata.normalize("NFKC", character).split("\u2044"))
        for character in _VULGAR
    }
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SAID = (
    r"\\(?:text(?:bf|it|rm|tt|sf|normal|up|md)?|math(?:rm|bf|it|sf|tt|bb|cal|normal)?|boldsymbol|bm|mbox|hbox|emph"
    r"|operatorname\*?|underline|underbrace|overbrace|boxed|fbox|framebox|num|(?:text)?color\s{0,9}\{\w{0,30}\})"
)
"""Commands whose braces hold what is said."""
_UNWRAPPED = re.compile(_SAID + r"\s{0,9}\{([^{}]*)\}")


def _compiled(*rules: tuple[str, str]) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(pattern), replacement) for pattern, replacement in rules]


_NOT_ASCII = _compiled((r"√\s?(\d+(?:\.\d+)?)(?!\d|[.,]\d)", r"\\sqrt{\1}"))
_HTML = _compiled(
    (r"<<[^<>]{0,200}>>", " "),  # the calculator's notes in GSM8K's solutions
    (r"(?i)<sup>", "^{"),
    (r"(?i)<sub>", "_{"),
    (r"(?i)</su[pb]>", "}"),
    (r"</?[A-Za-z][\w:-]{0,30}(?:\s[^<>]{0,60})?/?>", " "),
)
_TEX = _compiled(
    (r"\\\\(?:\[[^\[\]]{0,10}\])?", "\n"),
    (r"\\!", ""),
    (r"\\[,;:> ]", THIN),
    (r"\\[()\[\]]", "$"),
    (r"\\(?:\$|(?:pounds|euro|yen|EUR|textdollar|texteuro|textsterling|textyen|mathdollar)(?![A-Za-z]))", "$"),
    (r"\\%", "%"),
    (r"\\\{", "("),
    (r"\\\}", ")"),
    (r"\\(?:left|right|[bB]igg?[lr]?|(?:display|text)style|rm|bf|it|sf|tt|large|Large|huge|Huge)(?![A-Za-z])", " "),
    (r"\\(?:begin|end)\{[^{}]{0,30}\}", " "),
    (r"\\(?:times|cdot|ast)(?![A-Za-z])", TIMES),
    (r"\\div(?![A-Za-z])", "/"),
    (r"\\(?:quad|qquad|enspace|space|hfill|newline)(?![A-Za-z])", "  "),
    (r"\\(?:approx|simeq|cong|equiv|implies|(?:R|r|Longr|longr)ightarrow|to|therefore)(?![A-Za-z])", "="),
    (r"\\(?:leq?|geq?|lt|gt|neq?|(?:leq|geq)slant|ll|gg)(?![A-Za-z])", "<"),
    (r"\\[pm][mp](?![A-Za-z])", "±"),
    (r"\^\s{0,9}(?:\{\s{0,9}\\circ\s{0,9}\}|\\circ(?![A-Za-z]))|\\(?:circ|degree|textdegree)(?![A-Za-z])", "°"),
    (r"\\(?:[dtc]frac|nicefrac|sfrac)(?![A-Za-z])", r"\\frac"),
    (r"\\frac\s{0,9}(\d)", r"\\frac{\1}"),
    (r"(\\frac\s{0,9}\{[^{}]{1,50}\})\s{0,9}(\d)", r"\1{\2}"),
    (r"\\sqrt\s{0,9}(\d)(?!\d)", r"\\sqrt{\1}"),
    (_SAID + "(?![A-Za-z])", " "),  # what had braces inside its braces: they group
)
_PLAIN = _compiled(
    (r"(?<=[\d)}])\*\*(?=\d)|(?<=[\d)}]) \*\* (?=\d)", "^"),  # a power; other pairs of stars are bold
    (r"\*\*|`|&|(?<![\w}])__?(?=[\w$-])|(?<=[\w.%$])__?(?![\w{])", " "),
    (r"\{,\}", ","),
    (r"[-=]{1,2}>", "="),
    (r"~~[^~\n]{1,99}~~", " "),  # struck out
    (r"~", THIN),
    (r"(?<![\w.,])0[xX](?=\d*[A-Fa-f])", r"0\\hex "),
    (r"(?<=\d)\s?[xX]\s?(?=\d)", TIMES),
    (r"(?<![A-Za-z\\])sqrt(?=[({])", r"\\sqrt"),
)


def undress(text: str) -> str:
    r"""``text``, at most some thousand characters, with "-", ``TIMES``, "/", "^{2}" and "\frac{1}{2}" for every form of
    them, "$" for every currency, ``THIN`` for every thin space, and ``RANGE`` for every long dash."""
    if not text.isascii():
        text = text.translate(_CHARACTERS)
        text = re.sub("[⁰¹²³⁴-⁹⁺⁻]+", lambda match: "^{" + match[0].translate(_SUPERSCRIPTS) + "}", text)
        text = re.sub("[₀-₉]+", lambda match: "_{" + match[0].translate(_SUBSCRIPTS) + "}", text)
        text = re.sub(r"(?![0-9])\d", lambda match: str(unicodedata.decimal(match[0])), text)
        text = _replaced(_NOT_ASCII, text)
    if "<" in text:
        text = _replaced(_HTML, text)
    if "\\" in text:
        for _ in range(4):  # a command in a command
            text = _UNWRAPPED.sub(r" \1 ", text)
        text = _replaced(_TEX, text)
    return _replaced(_PLAIN, text)


def _replaced(rules: list[tuple[re.Pattern[str], str]], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text
