r"""TeX as people write it brought into one form: "\dfrac12", "\frac 1 2" and "½" become "\frac{1}{2}".

Nothing here decides what an answer is worth; it only takes away what makes two spellings of one answer differ.
"""

from __future__ import annotations

import re

TEXT_FONTS = r"text|textbf|textit|textrm|textnormal|textsf|texttt|textup|mbox|hbox|operatorname\*?|mathrm|rm"
MATH_FONTS = r"mathbf|mathit|mathsf|mathcal|mathnormal|boldsymbol|bm|pmb|boxed|fbox|ensuremath|displaystyle|bf"

_GREEK = r"alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho"
_CHARACTERS = str.maketrans(
    {chr(0xFEE0 + code): chr(code) for code in range(0x21, 0x7F)}  # full-width
    | {chr(0x3B1 + place): rf"\{name} " for place, name in enumerate(_GREEK.split(" "))}
    | dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63", "-")
    | dict.fromkeys("\u00a0\u2002\u2003\u3000\n\t\r", " ")
    | dict.fromkeys("\u2005\u2006\u2007\u2008\u2009\u200a\u202f", r"\,")
    | dict.fromkeys("\u00ad\u200b\u200c\u200d\u2060\ufe0f\ufeff", None)
    | {"√": r"\sqrt", "∞": r"\infty ", "\u222a": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset "}
    | {"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∓": r"\mp ", "\u00d7": r"\times "}
    | {"·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "°": r"^\circ ", "\u03c3": r"\sigma "}
    | {"φ": r"\phi ", "ω": r"\omega ", "τ": r"\tau ", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}"}
)
_SAME = {
    r"\\(?:dfrac|tfrac|cfrac|nicefrac|sfrac)(?![A-Za-z])": r"\\frac",
    r"\\(?:dbinom|tbinom)(?![A-Za-z])": r"\\binom",
    r"\\(?:left|right|bigg?[lrm]?|Bigg?[lrm]?|displaystyle|textstyle|limits|nolimits)(?![A-Za-z])\s*\.?": "",
    r"\\(?:leq|leqslant|leqq)(?![A-Za-z])|<=|=<": r"\\le ",
    r"\\(?:geq|geqslant|geqq)(?![A-Za-z])|>=": r"\\ge ",
    r"\\neq(?![A-Za-z])|!=|\\not\s*=": r"\\ne ",
    r"\\lt(?![A-Za-z])": "<",
    r"\\gt(?![A-Za-z])": ">",
    r"\\(?:lbrace|\{)": r"\\{",
    r"\\(?:rbrace|\})": r"\\}",
    r"\\(?:langle|lparen)(?![A-Za-z])": "(",
    r"\\(?:rangle|rparen)(?![A-Za-z])": ")",
    r"\\lbrack(?![A-Za-z])": "[",
    r"\\rbrack(?![A-Za-z])": "]",
    r"\\(?:varnothing|phi\s*$)": r"\\emptyset ",
    r"\\(?:mathbb|Bbb)\s*\{?\s*R\s*\}?|\\(?:R|reals)(?![A-Za-z])": r"\\mathbb{R}",
    r"\+\s*\\infty": r"\\infty ",
    r"\\(?:simeq|cong|doteq)(?![A-Za-z])": r"\\approx ",
    r"\\(?:lor|vee)(?![A-Za-z])": r"\\text{ or }",
    r"\\(?:land|wedge)(?![A-Za-z])": r"\\text{ and }",
    r"\\(?:ldots|cdots|dotsc|dotsb)(?![A-Za-z])": r"\\dots ",
    r"\*\*": "^",
    r"\\ast(?![A-Za-z])|\*": r"\\cdot ",
    r"\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\circ(?![A-Za-z])|\\degree(?![A-Za-z]))|\\degree(?![A-Za-z])": "",
    r"\\?%|\\?\$": "",
    r"\\(?:quad|qquad|hspace\*?\{[^{}]*\}|[ ;:>])|~": " ",
    r",\s*\\!\s*(?=\d{3}(?!\d))": ",",
    r"\\!": "",
    r"^\s*\\\{\s*\\\}\s*$": r"\\emptyset ",
}
_RAISED = re.compile("[⁰¹²³⁴-⁹⁺⁻]+")
_PLAIN_DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_RULES = [(re.compile(pattern), replacement) for pattern, replacement in _SAME.items()]
_TEXT = re.compile(rf"\\(?:{TEXT_FONTS})(?![A-Za-z])\s*")
_FONT = re.compile(rf"\\(?:{MATH_FONTS})(?![A-Za-z])\s*")
_SHORT_FRACTION = re.compile(r"\\frac\s*(\{[^{}]*\}|[A-Za-z0-9])\s*(?=([A-Za-z0-9]))([A-Za-z0-9])")
_SHORT_ABOVE = re.compile(r"\\frac\s*([A-Za-z0-9])\s*\{")
_SHORT_ROOT = re.compile(r"\\sqrt\s*(\[[^\[\]]*\])?\s*([A-Za-z0-9])")
_PLAIN_ROOT = re.compile(r"(?<![A-Za-z\\])sqrt\s*\(([^()]*)\)")
_REPEATING = re.compile(r"(?<![\d.])(\d{0,40})\.(\d{0,40})\\(?:overline|dot|bar)\s*\{\s*(\d{1,40})\s*\}")
_ESCAPED_TWICE = re.compile(r"\\\\(?=[A-Za-z(){}\[\]])")
"""A command as JSON writes it: two backslashes."""
_PERCENT = re.compile(r"(?<=\d)\s*(?:\\text\{\s*)?(?:percent|percentage|pct)\.?\s*\}?\s*$")
_NAMES = "sin|cos|tan|cot|sec|csc|ln|log|exp|min|max|gcd|lcm|det|pi|infty|arcsin|arccos|arctan"
_BARE_NAME = re.compile(rf"(?<![A-Za-z\\])({_NAMES})(?![A-Za-z])")


def tidy(text: str) -> str:
    r"""The answer in one form: fractions as \frac{a}{b}, text as \text{...}, no delimiters, spacing or percent signs.

    Linear in the text's length, which the caller bounds.
    """
    text = _RAISED.sub(lambda m: "^{" + m[0].translate(_PLAIN_DIGITS) + "}", text).translate(_CHARACTERS).strip()
    if r"\begin" not in text:
        text = _ESCAPED_TWICE.sub(r"\\", text)
    text = re.sub(r"\\\\(?:\s*\[[^\[\]]{0,20}\])?", "\x00", text)  # the end of a matrix's row
    text = re.sub(r"\\[()\[\]]", " ", text)
    text = re.sub(r"(?<=\d)~(?=\d{3}(?!\d))", r"\\,", text)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = _thousands(text)
    text = _TEXT.sub(lambda _: r"\text", text)
    text = re.sub(r"\\text\s*([A-Za-z])", r"\\text{\1}", text)
    text = _without_fonts(text)
    text = _REPEATING.sub(_repeating, text)
    text = _SHORT_ABOVE.sub(r"\\frac{\1}{", text)
    text = _SHORT_FRACTION.sub(lambda m: rf"\frac{{{m[1].strip('{}')}}}{{{m[3]}}}", text)
    text = _SHORT_ROOT.sub(lambda m: rf"\sqrt{m[1] or ''}{{{m[2]}}}", text)
    text = _PLAIN_ROOT.sub(r"\\sqrt{\1}", text)
    text = _BARE_NAME.sub(r"\\\1 ", text) if r"\text" not in text else text
    text = _PERCENT.sub("", text)
    return re.sub(r"\s+", " ", text).lstrip(" ,;:").rstrip(" .,;:")


def _thousands(text: str) -> str:
    r"""Without what stands between thousands but a comma: 1{,}080 and 1\,080 become 1,080."""
    text = re.sub(r"(?<=\d)\s*(?:\{,\}|,\s*\\,)\s*(?=\d{3}(?!\d))", ",", text)
    text = re.sub(r"(?<=\d)\\,(?=\d{3}(?!\d))", ",", text)
    return text.replace(r"\,", " ").replace("{,}", ",")


def _without_fonts(text: str) -> str:
    r"""\mathbf{x} becomes {x}: braces group, and are taken off where they hold a whole answer."""
    return _FONT.sub("", text)


def _repeating(match: re.Match[str]) -> str:
    r"""0.1\overline{6} is 1/6: (16 - 1) / 90."""
    whole, before, period = match[1] or "0", match[2], match[3]
    below = (10 ** len(period) - 1) * 10 ** len(before)
    return rf"\frac{{{int(whole + before + period) - int(whole + before)}}}{{{below}}}"


def key(text: str) -> str:
    r"""What two spellings of one answer share after ``tidy``: no spaces, no groups of one, \text taken off."""
    plain = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)
    is_words = plain != text or re.fullmatch(r"[A-Za-z][A-Za-z' -]{2,}", plain) is not None
    plain = re.sub(r"\{([A-Za-z0-9])\}", r"\1", plain)
    plain = re.sub(r"\s+(?!\d)|(?<!\d)\s+", "", plain).strip("{}.,;:\"'")
    if letter := re.fullmatch(r"\(([A-Za-z])\)", plain):
        return letter[1]
    return plain.casefold() if is_words and len(plain) > 1 else plain
