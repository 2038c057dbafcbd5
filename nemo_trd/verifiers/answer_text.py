r"""Finds the final answer of a generated text, and brings its many notations to one.

Nothing here computes: texts go in and come out, in time proportional to their length.
"""

from __future__ import annotations

import re
from collections.abc import Callable

BOX = re.compile(r"\\(?:f?boxed|fbox|framebox)\s*\{")
BRACE = re.compile(r"\\[\s\S]|[{}]")  # an escaped one is a character of the answer
ENUMERATION = re.compile(
    r"[\s$]*(?:[,;]|,? ?(?:\\text\s*\{\s*)?(?:and|or)(?:\s*\})?)[\s$]*"
    r"(?:\\quad)?\s*(?:[A-Za-z]\w*\s*=\s*)?"
)
TAGGED = re.compile(r"<answer>((?:(?!</?answer>)[^#]){1,2000})</answer>")
MARKED = re.compile(r"####[ \t]*(\S[^\n]*)")
ANNOUNCED = re.compile(
    r"(?i:\b(?:answers?|options?|choices?)\b)[^\n:=]{0,60}?(?:\bis\b|\bare\b|[:=])[\s:*]*([^\n]+)"
)
CONCLUDED = re.compile(
    r"(?:\b(?:is|are|equals?|gets?|gives|takes|obtain)|[=:])\s+((?:[^=:\n]|(?<=\d):(?=\d)){1,60})\s*\Z"
)
RETRACTED = re.compile(r"(?i)\b(?:wait,? no|no,? wait|scratch that|I was wrong)\b")
_NUMBER = r"[\s$*\\(]*[-+]?\d[\d.,/]*[\s$*\\)]*"
# Ends of a text that hold its last number and do not say that it is the answer.
NOT_SAID = re.compile(
    rf"(?i)(?:(?:\b(?:not|than|at least|at most)|\bbetween{_NUMBER}and)\b{_NUMBER}[a-z]*[\s.!*]*"
    rf"|\d[\s$*\\)]*(?:\?|(?:is|was) (?:not|wrong|incorrect)\b)\D*)\Z"
)
STEP = re.compile(r"(?im)\b(?:step|case|part)\s+\d+\b|^\s*\d+[.)]\s+(?=[A-Za-z*])")
FORMULA = re.compile(r"(?:\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\])[\s*.]*(?:$|[.!]\s)")
SENTENCE = re.compile(r"((?:[A-J]\. )?.+?)[\s*]*(?:\.[\s*]|[.!]?[\s*]*$)")

SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n")
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
VULGAR = {
    **{"½": "12", "⅓": "13", "⅔": "23", "¼": "14", "¾": "34", "⅕": "15", "⅖": "25", "⅗": "35"},
    **{"⅘": "45", "⅙": "16", "⅚": "56", "⅐": "17", "⅛": "18", "⅜": "38", "⅝": "58", "⅞": "78"},
    **{"⅑": "19", "⅒": "110"},
}  # above the line one digit
SYMBOLS = str.maketrans(
    {
        **{part: rf"\frac{{{number[0]}}}{{{number[1:]}}}" for part, number in VULGAR.items()},
        **dict.fromkeys("\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f", " "),
        **dict.fromkeys("\u200b\u2060\u2061\u2062\u2063\ufeff", ""),
        **dict.fromkeys("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e", ""),  # directions
        **dict.fromkeys("\u2066\u2067\u2068\u2069", ""),
        **dict.fromkeys("−–‒﹣－", "-"),
        **dict.fromkeys("·⋅∙", r"\cdot "),
        **{"×": r"\times ", "÷": "/", "∕": "/", "⁄": "/", "±": r"\pm ", "∓": r"\mp "},
        **{"π": r"\pi ", "∞": r"\infty ", "∅": r"\emptyset ", "°": r"^\circ "},
        **{"≤": r"\le ", "≥": r"\ge ", "≠": r"\neq ", "⩽": r"\le ", "⩾": r"\ge "},
        **{"∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∉": r"\notin ", "∖": r"\setminus "},
        **{"⟨": r"\langle ", "⟩": r"\rangle ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}"},
        **{"θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ", "φ": r"\phi "},
        **{"٫": ".", "٬": ",", "،": ",", "٪": r"\%"},  # Arabic
        **{"，": ",", "：": ":", "（": "(", "）": ")", "′": "'", "’": "'", "″": '"'},
    }
)
FOREIGN_DIGIT = re.compile(r"(?![0-9])\d")  # full width, Arabic, ...
ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}
ROOT = re.compile(r"([√∛∜])\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|\\?[A-Za-z]+))?")
BARE_PI = re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])")
SIZED = re.compile(r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])")
COLOR = re.compile(  # with the braces around what it colours, if these are not needed
    r"(\\[A-Za-z]+)?\\(?:text)?color\s*(?:\[\w+\]\s*)?\{[^{}]*\}"
    r"(?:\{((?:[^{}\\]|\\.|\{[^{}]*\})*)\}(?![A-Za-z]))?"
)
STYLE = re.compile(r"\\(?:displaystyle|textstyle|mathstrut|normalsize|bf|rm|it)(?![A-Za-z])")
TEXT_COMMAND = re.compile(
    r"\\(?:text|textbf|textit|textrm|texttt|textsf|textnormal|mathrm|mathbf|mathit|mathsf|mathtt"
    r"|boldsymbol|mbox|operatorname|underline|emph)\s*\{([^{}]*)\}"
)
CURRENCIES = {"$": "dollars", "£": "pounds", "€": "euros"}
POWER = re.compile(r"(?<=[\w)}]) ?\*\* ?(?=[\w(\\{-])")  # other pairs of asterisks are bold type
LONG_EXPONENT = re.compile(r"\^(-?\d{2,}|-\d)")  # LaTeX would take one digit only
MONEY = re.compile(r"\$?\\?([$£€])\s*(\d[\d,]*(?:\.\d+)?)\$?")  # $5 alone is money, $5$ is not
LATEX_SPACE = re.compile(r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~")
LATEX_COMMA = re.compile(r"(?<=\d)(?:\{,\}|,\\!)(?=\d{3}(?!\d))")  # never between two numbers
# Where some commas are followed by a space, or "and" stands, those without are within numbers.
LISTED = re.compile(r",\s|\d\s*(?:\\text\s*\{)?\s*(?:and|or)\b")
IN_THOUSANDS = re.compile(  # (3,400) is a pair everywhere
    r"(?<![\d.,])(?!(?<=[(\[])[\d,]+[)\]])\d{1,3}(?:,\d{3})+(?!,?\d)"
)
# "1 234 567" and its like; the last two alternatives need two groups to be no decimal or quotation
GROUPED = re.compile(
    r"(?<![\d.,/^_])(?:\d{1,3}(?: \d{3})+|\d{1,3}(?:\.\d{3}){2,}|\d{1,3}(?:'\d{3})+)(?![\d/,'])"
)
APART = re.compile(r"(?<=\d)(?<![_^]\d) (?=\d+(?![\d/_]))")  # LaTeX would glue them together
ARGUMENTS = re.compile(r"\\(?:frac|sqrt|binom)\s*\d")
REPEATING = re.compile(r"(\d*\.\d*?)(\d{1,6}?)\2{2,}(?:\.{3}|…|\\[lc]?dots)")  # 0.333...
REVERSED = re.compile(r"([][(])([^][()]+,[^][()]+)([][)])")  # ]1,2[ is (1,2)
ONE_TUPLE = re.compile(r"\\\{ ?(\([^()]*,[^()]*\)) ?\\\}")  # the set of one solution
MIXED = re.compile(r"(?<![\d.,/^_}])(\d+) (\d+)/(\d+)(?![\d/^])")
MIRRORED = re.compile(r"(?!\s*[A-Za-z]\s*=)([^=<>]+)=\s*([A-Za-z])")  # 5 = x, not x = y


def final_answer(text: str, can_be_answer: Callable[[str], bool] | None = None) -> str | None:
    """Content of the last complete box, else of <answer>, else of the line after the last "####".

    Boxes that are enumerated, "\\boxed{2} and \\boxed{3}", are one answer, "2, 3". Of lines after
    "####" that more text follows, only those count that `can_be_answer` accepts (by default all):
    Markdown's headings of the fourth level look the same.
    """
    boxes = _boxes(text)
    if not boxes:
        marked_answers = TAGGED.findall(text) or [
            line[1]
            for line in MARKED.finditer(text)
            if can_be_answer is None or not text[line.end() :].strip() or can_be_answer(line[1])
        ]
        return marked_answers[-1] if marked_answers else None
    begin, start, end = boxes[-1]
    answers = [text[start:end]]
    for earlier, earlier_start, earlier_end in reversed(boxes[:-1]):
        if begin - earlier_end > 40 or not ENUMERATION.fullmatch(text[earlier_end + 1 : begin]):
            break
        begin = earlier
        if text[earlier_start:earlier_end] not in answers:
            answers.insert(0, text[earlier_start:earlier_end])
    return ", ".join(answers)


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """(begin of the box, begin and end of its content) of each complete box, in order."""
    begins = {match.end() - 1: match.start() for match in BOX.finditer(text)}
    opened: list[int] = []
    boxes = []
    for match in BRACE.finditer(text) if begins else ():
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            start = opened.pop()
            if start in begins:
                boxes.append((begins[start], start + 1, match.start()))
    return sorted(boxes)


def announced_answer(text: str) -> str | None:
    """Formula or sentence after the last "the answer is ...", "Answer: ..." of a text.

    Without any, the end of the last sentence: "so we get ...".

    It may hold more than the answer: the caller checks whether it can be one.
    """
    announced = ANNOUNCED.findall(text) or CONCLUDED.findall(text[-200:])
    if not announced:
        return None
    announcement = announced[-1][:400]
    if not POWER.search(announcement):
        announcement = announcement.partition("**")[0]  # a bold answer ends there
    formula = FORMULA.match(announcement)
    if formula:
        return next(part for part in formula.groups() if part)
    sentence = SENTENCE.match(announcement)
    return sentence[1] if sentence else None


def in_plain_latex(text: str) -> str:
    """Write signs of Unicode as LaTeX, and leave out commands that only decorate."""
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ]+", lambda m: f"^{{{m[0].translate(SUPERSCRIPTS)}}}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda m: f"_{{{m[0].translate(SUBSCRIPTS)}}}", text)
    text = FOREIGN_DIGIT.sub(lambda m: str(int(m[0])), text)
    text = ROOT.sub(_root, text.translate(SYMBOLS)).replace(r"\varnothing", r"\emptyset")
    text = COLOR.sub(lambda m: (f"{m[1]} " if m[1] else "") + (m[2] or ""), text)
    return STYLE.sub("", SIZED.sub("", text))


def _root(match: re.Match[str]) -> str:
    under = next((part for part in match.groups()[1:] if part is not None), None)
    command = ROOTS[match[1]]
    return command if under is None else f"{command}{{{under}}}"


def tidy(answer: str) -> str:
    """Remove from a final answer in plain LaTeX everything that does not change its meaning.

    Dollar signs, spaces, text commands around all of it and a full stop go; "1 234" is joined,
    "1 1/2" is set as a mixed number, and numbers that merely stand side by side become a list.
    """
    answer = LATEX_COMMA.sub("", answer)
    answer = LATEX_SPACE.sub(" ", answer.replace("\\!", "")).replace("{,}", ",").strip()
    if LISTED.search(answer):
        answer = IN_THOUSANDS.sub(lambda match: match[0].replace(",", ""), answer)
    money = MONEY.fullmatch(answer)
    if money is not None:
        return f"{money[2]} {CURRENCIES[money[1]]}"
    answer = re.sub(r"(?<!\\)\\[()\[\]]|\\\$|[$`]", "", answer)
    answer = re.sub(r"\\[lr]angle(?![A-Za-z])", lambda m: "(" if m[0][1] == "l" else ")", answer)
    answer = REPEATING.sub(r"\1\\overline{\2}", answer.replace(";", ","))
    answer = " ".join(answer.split()).strip("* ").rstrip(".").strip()
    answer = LONG_EXPONENT.sub(r"^{\1}", POWER.sub("^", answer).replace("**", ""))
    while (unwrapped := TEXT_COMMAND.fullmatch(answer)) is not None:
        answer = unwrapped[1].strip().rstrip(".")
    answer = BARE_PI.sub(r"\\pi ", answer)
    answer = GROUPED.sub(lambda match: re.sub(r"[ .']", "", match[0]), answer)
    answer = MIXED.sub(_mixed, answer)
    answer = re.sub(r"(?<=\d) (?=\\frac)", "", answer)
    reversed_ = REVERSED.fullmatch(answer)
    if reversed_ and (reversed_[1] == "]" or reversed_[3] == "["):
        begin, end = reversed_[1].replace("]", "("), reversed_[3].replace("[", ")")
        answer = begin + reversed_[2] + end
    answer = ONE_TUPLE.sub(r"\1", answer) if ONE_TUPLE.fullmatch(answer) else answer
    mirrored = MIRRORED.fullmatch(answer)
    if mirrored:
        answer = f"{mirrored[2]} = {mirrored[1].strip()}"
    return answer if ARGUMENTS.search(answer) else APART.sub(", ", answer)


def _mixed(match: re.Match[str]) -> str:
    whole, over, under = match.groups()
    return rf"{whole}\frac{{{over}}}{{{under}}}" if int(over) < int(under) else match[0]


def same_text(answer: str, expected: str) -> bool:
    """Whether two tidy answers are the same but for spaces and braces around one character."""
    return _bare(answer) == _bare(expected)


def _bare(answer: str) -> str:
    answer = re.sub(r"(?<![A-Za-z\d]) | (?![A-Za-z\d])", "", answer)
    return re.sub(r"(?<=[\^_])\{(\w)\}", r"\1", re.sub(r"\\[dtc]frac", r"\\frac", answer))
