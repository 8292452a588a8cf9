r"""Which option a response to a multiple-choice question commits to.

`find_choice` looks in this order, and the first place that commits to something decides:

1. What stands after the reasoning (`</think>`), then the reasoning itself.
2. The last `\boxed{}` or `<answer>` that names an option. Boxes with nothing but "and", "or" or punctuation between
   them count together. A statement after the box wins only if a word of correction ("wait", "actually") comes with it.
3. A last line that is an option and nothing else: "B", "(B)", "B. Paris", "Paris".
4. The last statement: "the answer is (B)", "Answer: Paris", "I choose B", "So option B.", "B is the correct answer".
5. A first line that is an option and nothing else, where no other line is.
6. Weaker words ("B is correct", "this matches option B"), if they all name the same option.

A commitment to several options, or to a letter that the row does not have, is a commitment to no option: it is not
looked past. A capital letter is the option of that letter, even where it is also the text of another option. Option
text counts word for word, up to typography and, where that leaves one option, up to case.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

GRADER_VERSION = "1"  # raised whenever a verdict can change: records of different versions are not comparable
LETTERS = "ABCDEFGHIJ"

CLAUSE_CHARS = 80  # how far before it a word like "if" is looked for


def shuffled(count: int, key: str) -> list[int]:
    """A permutation of range(count) that depends on `key` alone: the same on every machine and in every version.

    The indices in the order of their SHA-256 with the key, so each permutation is equally likely over the keys.
    """
    return sorted(range(count), key=lambda index: hashlib.sha256(f"{key}\n{index}".encode()).digest())


def option_lines(options: Sequence[str]) -> str:
    """The options as a prompt shows them, a line each: "A) Paris"."""
    return "\n".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))


def find_choice(response: str, options: Sequence[str]) -> tuple[str | None, str | None]:
    """The letter of the option that a response commits to, and `<where>:<how>` it was found.

    Where: 'boxed', 'line' or 'stated'; how: by 'letter' or by 'text'. (None, '<where>:none') for a commitment to
    several options or to a letter that there is not; (None, None) where there is no commitment. `options` are the
    texts of options A, B, ..., at most 10.
    """
    known = _Options.of(tuple(options))
    thoughts = list(_THOUGHT_END.finditer(response))
    parts = (response[thoughts[-1].end() :], response[: thoughts[-1].start()]) if thoughts else (response,)
    for text in parts:
        found = _committed(plain(text), known)
        if found is not None:
            where, named = found
            letter = named.letters if len(named.letters) == 1 and named.letters in known.letters else None
            return letter, f"{where}:{named.how if letter else 'none'}"
    return None, None


# ---------------------------------------------------------------------------------------------------------------------
# Typography

_THOUGHT_END = re.compile(r"</think(?:ing)?>|</thought>|<\|end_of_thought\|>")
_WIDE = str.maketrans(
    "（）［］【】：．。，、；？！“”‘’\u00a0\u202f", "()[][]:..,,;?!\"\"''  ", "\u200b\u200e\u2060\ufeff"
)
_TEXT_COMMAND = re.compile(
    r"\\(?:text(?:bf|it|tt|rm|sf|sc|normal)?|math(?:rm|bf|it|sf|tt|cal|bb)|boldsymbol|bm|emph|underline|mbox|operatorname"
    r"|bf|rm|it|large|Large)\s*\{([^{}]*)\}"
)
_DECORATION = re.compile(
    r"\\(?:bf|rm|it|bfseries|displaystyle|textstyle|large|Large|huge|Huge|left|right|quad|qquad)(?![A-Za-z])"
    r"|\\[()\[\]!]|(?<!\\)\$|[*`]|(?<!\w)_+(?=\w)|(?<=\w)_+(?!\w)"
    r"|</?(?:b|i|u|em|strong|span|p|div|center|code|mark)(?:\s[^<>]*)?>|^[ \t]*\#{1,6}[ \t]+",
    re.MULTILINE | re.IGNORECASE,
)
_LATEX_SPACE = re.compile(r"\\[,;: ]")
_ESCAPED = re.compile(r"\\([%&#_$])")


def plain(text: str) -> str:
    """Text without Markdown, HTML and LaTeX that only decorates it; boxes and line breaks stay."""
    text = re.sub(r"<br\s*/?>", "\n", text.translate(_WIDE), flags=re.IGNORECASE)
    for _ in range(3):  # \textbf{\text{(B)}}
        text = _TEXT_COMMAND.sub(r"\1", text)
    text = _LATEX_SPACE.sub(" ", _DECORATION.sub("", text))
    return _ESCAPED.sub(r"\1", text)


def _normal(text: str) -> str:
    """Plain text as options are compared: single spaces, no period at the end, no quotation marks around."""
    text = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", text.replace("$", ""))
    text = " ".join(text.split()).rstrip(" .")
    return text[1:-1].rstrip(" .") if len(text) > 2 and text[0] == text[-1] in "\"'" else text


# ---------------------------------------------------------------------------------------------------------------------
# The options, and what a few words name


@dataclass(frozen=True)
class _Named:
    """The letters that some words name, and whether by 'letter' or 'text': one is an answer, none or several is not."""

    letters: str
    how: str = "letter"


_NOTHING = _Named("")
_JOINT = r"\s*(?:,|/|&|;|\+|\band\b|\bor\b)\s*(?:\band\b|\bor\b)?\s*"
_MAYBE = r"(?:(?:option|choice|answer|maybe|possibly|perhaps|both|either)\s+)?"
_LETTER_TEXT = re.compile(r"(?i:(?:option|choice|answer)\s+)?[A-J]")
_BARE = re.compile(r"[\s(\[{\"'>]*([A-Za-z])[\s)\]}\"'.:,;]*")
_SEVERAL = re.compile(
    rf"(?i:both\s+|either\s+)?[(\[]?[A-J][)\].]?(?:(?i:{_JOINT}{_MAYBE})[(\[]?[A-J][)\].]?)+|[A-J]{{2,10}}"
)
_LEAD = re.compile(
    r"\s*(?:the\s+)?(?:(?:final|correct|right|best)\s+)*(?:answer|option|choice)(?:\s+is\b)?\s*[:=]?\s*", re.IGNORECASE
)
_LABELLED = re.compile(r"[(\[]?([A-Z])(?:[)\]]|[.:,](?=\s)|\s+[-–—:](?=\s))[.:]?\s*(\S.*)", re.DOTALL)
_LABEL_AND_TEXT = (
    re.compile(r"(?P<text>.*\S)\s*[(\[](?P<letter>[A-J])[)\]]\.?", re.DOTALL),  # London (B)
    re.compile(r"(?P<letter>[A-J])\s+\(?(?P<text>\S.*?)\)?", re.DOTALL),  # B (London)
)
_CLAUSE_END = re.compile(
    r"(?<=\S)(?=[.!;\"']*\s*(?:\n|$)|[.!;]+[\"']?\s|[\"']?\s*\?|,?\s*\("
    r"|,?\s(?:because|since|as|which|due|given)\b|,\s(?!or\b|and\b)[a-z])"
)


@dataclass(frozen=True)
class _Options:
    """A row's letters, and the letter of each option text: exactly, and up to case ('' where two options share it)."""

    letters: str
    exact: dict[str, str]
    folded: dict[str, str]
    reach: int  # the most characters in which an option's text can stand, with decoration or words before it

    @staticmethod
    @lru_cache(maxsize=64)  # the samples of an item come one after the other
    def of(options: tuple[str, ...]) -> _Options:
        if not 1 <= len(options) <= len(LETTERS):
            raise ValueError(f"{len(options)} options; a question has 1 to {len(LETTERS)}")
        exact: dict[str, str] = {}
        folded: dict[str, str] = {}
        for letter, option in zip(LETTERS, options, strict=False):
            text = _normal(plain(option))
            if not text or (_LETTER_TEXT.fullmatch(text) and text[-1] in LETTERS[: len(options)]):
                continue  # "B" and "option B" can only be meant as the letter
            exact[text] = "" if text in exact else letter
            if len(text) > 1:
                folded[text.casefold()] = "" if text.casefold() in folded else letter
        return _Options(LETTERS[: len(options)], exact, folded, 100 + 2 * max(map(len, options)))

    def by_text(self, text: str) -> _Named | None:
        """The option with this text."""
        text = _normal(text)
        letter = self.exact.get(text) or self.folded.get(text.casefold())
        return _Named(letter, "text") if letter else None

    def by_letter(self, letter: str) -> _Named | None:
        """The option of a capital letter; none that there is for another of A to J; None for a letter past J."""
        if letter in self.letters:
            return _Named(letter)
        return _NOTHING if letter in LETTERS else None

    def read(self, text: str) -> _Named | None:
        """What a box holds, or a line: None if it is neither letters nor an option's text."""
        boxes = list(_BOX.finditer(text))
        if boxes:
            return self.read(_content(boxes[-1]))
        if len(text) > self.reach:
            return None
        bare = _BARE.fullmatch(text)
        if bare is not None:
            return self._read_bare(bare[1], text)
        by_text = self.by_text(text)
        if by_text is not None:
            return by_text
        text = text.strip().rstrip(".")
        if _SEVERAL.fullmatch(text):
            return _Named("".join(sorted(set(re.findall(r"[A-J](?![a-z])", text)))))
        lead = _LEAD.match(text)
        if lead is not None and lead.end() < len(text):
            return self.read(text[lead.end() :])
        labelled = _LABELLED.fullmatch(text)
        if labelled is not None:
            return self.by_letter(labelled[1])
        for pattern in _LABEL_AND_TEXT:
            match = pattern.fullmatch(text)
            if match is not None and self.by_text(match["text"]) == _Named(match["letter"], "text"):
                return _Named(match["letter"])
        return None

    def _read_bare(self, letter: str, text: str) -> _Named | None:
        """A letter on its own. In lower case it is rather the text of an option, and `i` is the imaginary unit."""
        if letter in self.letters:
            return _Named(letter)
        by_text = self.exact.get(_normal(text)) or self.exact.get(letter)
        if by_text:
            return _Named(by_text, "text")
        return None if letter == "i" else self.by_letter(letter.upper())

    def starts(self, text: str) -> tuple[_Named, int] | None:
        """The option whose text is the first clause or clauses of these words, and where they end."""
        found = None
        for end in _CLAUSE_END.finditer(text):
            named = self.by_text(text[: end.start()])
            if named is not None:
                found = named, end.start()
        return found


# ---------------------------------------------------------------------------------------------------------------------
# Boxes

_NESTED = r"[^{}]*+"
for _ in range(4):
    _NESTED = rf"(?:[^{{}}]++|\{{{_NESTED}\}})*+"
_BOX = re.compile(
    rf"(?:\\f?box|\\?\bboxed)\s*\{{({_NESTED})\}}|\\(?:f?box|boxed)\s*\(?([A-J])\b|<answer>((?:(?!<answer>).)*?)</answer>",
    re.DOTALL,
)
_BETWEEN = re.compile(r"(?:[\s,;/&.()-]|(?i:\band\b|\bor\b(?:\s+\w+)?))*")
_CORRECTION = re.compile(
    r"\b(?:wait|actually|correction|corrected|sorry|apologi[sz]e|apologies|on second thoughts?|scratch that"
    r"|let me correct|(?:made|was) an? (?:mistake|error)|my mistake|no,)",
    re.IGNORECASE,
)


def _content(box: re.Match[str]) -> str:
    """What is in a box or an answer tag."""
    return next(group for group in box.groups() if group is not None)


def _boxed(text: str, options: _Options) -> tuple[_Named, int] | None:
    """What the last boxes that name anything name together, and where they end."""
    boxes = [(box, named) for box in _BOX.finditer(text) if (named := options.read(_content(box))) is not None]
    if not boxes:
        return None
    last, named = boxes[-1]
    letters, start = set(named.letters), last.start()
    for box, earlier in reversed(boxes[:-1]):
        if not letters or not _BETWEEN.fullmatch(text, box.end(), start):
            break
        letters |= set(earlier.letters)
        start = box.start()
    return _Named("".join(sorted(letters)), named.how), last.end()


# ---------------------------------------------------------------------------------------------------------------------
# Statements

_ADVERB = (
    r"(?:therefore|thus|then|hence|clearly|indeed|definitely|certainly|likely|probably|most\s+likely|most\s+probably"
    r"|simply|actually|really|in\s+fact|still|now)"
)
_LINK = r"(?:\b(?:is|be|remains)\b|'s\b|[:=→–—]|-+>?)"
_LABEL = r"[(\[]?\b(?-i:[A-J])\b[)\]]?"
_IS = rf"\s+(?:is|(?:seems|appears)\s+to\s+be|would\s+be|must\s+be)\s+(?:{_ADVERB}\s+)?"
_OPTION = r"(?:(?:the\s+)?(?:option|choice|answer|letter)\s+)?"
_CUE = re.compile(
    rf"""
    \b(?:answers?|ans)\b(?!\s+(?:choices|options)\b) (?:"[^"\n]{{1,200}}"|[^.!?:=\n"]){{0,60}}?
      (?:["']?\s*{_LINK} | \s*\n | (?<=ans)\.\s | (?=\s[(\[][a-j][)\]]))                # the answer (to this) is
    | \b(?:correct|best|proper|appropriate|accurate)(?:\s+\w+){{0,3}}?\s*(?:{_LINK}|\n)  # the best description is
    | \bright\s+(?:option|choice|one)\s*{_LINK}                                         # the right choice is
    | \b(?:option|choice|selection|pick)\s*(?:\bis\b|:)                                 # my choice is
    | \b(?:i|we|i'll|we'll|i'd|i'm|let's|us|to)\s+(?:(?:would|will|should|must|am|going|to|have|{_ADVERB})\s+)*
      (?:choose|chose|select|selected|pick|picked|going\s+with|go\s+with|opt\s+for|settle\s+on)\b       # I choose
    | \b(?:choose|select|pick|i\.e\.,?|that\s+is,|namely,?)(?=\s+(?:option|choice|answer)\b)  # select option
    | \b(?:therefore|thus|hence|so|consequently|accordingly|conclusion|finally|overall)\b,?\s+
      (?:it(?:'s|\s+is|\s+must\s+be|\s+has\s+to\s+be|\s+should\s+be)\s+)?
      (?={_OPTION}{_LABEL}\s*(?:[.!]?\s*(?:\n|\Z)|[.!]\s)
        |{_OPTION}{_LABEL}{_IS}(?:the\s+)?(?:(?!not\b)\w+\s+)?(?:correct|right|best|answer)\b)  # so (it is) option B.
    | (?=(?:{_LABEL}|[(\[]?(?-i:[A-J])[)\]]\s[^.,;\n]{{1,80}})
        {_IS}the\s+(?:\w+\s+)?(?:answer|choice|option)\b)                               # B is the (right) answer
    | 答案(?:应该是|应为|选择|是|为|选|:)? | [故应因此所以]选(?:择|项)?                    # the answer is, so choose
    """,
    re.IGNORECASE | re.VERBOSE,
)
_FITS = r"(?:satisfies|matches|fits|works|remains|meets|describes|holds)\b"
_WEAK_CUE = re.compile(
    rf"""
    \b(?:correspond(?:s|ing)\s+to|match(?:es|ing)?|which\s+is|that\s+is|this\s+is|leads\s+to|consistent\s+with
      |points\s+to|aligns\s+with)\s+(?=(?:the\s+)?(?:option|choice|answer)\s|[(\[](?-i:[A-J])[)\]])
    | \b(?:leaves|leaving)(?:\s+(?:us|only|with))*\s+(?={_OPTION}{_LABEL})
    | \bonly\s+(?={_OPTION}{_LABEL}\s+{_FITS})
    | (?={_LABEL}{_IS}(?:correct|right|the\s+(?:best|one|only|most))\b)
    """,
    re.IGNORECASE | re.VERBOSE,
)
_AFTER_ALL = re.compile(rf"\bit(?:'s|\s+is|\s+(?:should|must|has\s+to)\s+be)\s+(?={_OPTION}{_LABEL})", re.IGNORECASE)
_HEDGE = re.compile(
    r"\b(?:if|whether|unless|suppos(?:e|ing)|assum(?:e|es|ed|ing)|neither|nor|mistaken?|mistakenly|wrongly|incorrectly"
    r"|misconception|tempt(?:ed|ing)"
    r"|(?:might|may|could|some|someone|people|students?)\s+(?:\w+\s+)?(?:think|say|choose|pick|select|answer)"
    r"|(?:not|n't)\s+(?:think|believe|mean|say))\b"
    r"|\b(?:can|could|may|might|cannot|can't|couldn't|not|n't)\s+(?:\w+\s+)?be\s*$",
    re.IGNORECASE,
)
_FILLER = re.compile(
    rf"(?:[\s:,>\"'–—-]|\b(?:{_ADVERB}|is|given\s+by|represented\s+by|labell?ed|that|with|as)\b"
    r"|\b(?:the\s+)?(?:(?:correct|right|best|final)\s+)*(?:option|choice|answer|letter)\b)*",
    re.IGNORECASE,
)
_NOT_BUT = re.compile(rf"not\s+{_OPTION}{_LABEL},?\s+but\s+(?:rather\s+)?{_OPTION}", re.IGNORECASE)
_LETTER = re.compile(
    r"[(\[{]\s*(?P<enclosed>[A-Ja-hj])\s*[)\]}]|(?P<labelled>[A-J])[)\]]|(?P<capital>[A-J])(?![\w-]|'\w|\s*[=<>^+°→])"
    r"|(?P<small>[a-hj])(?:[.)](?=\s|$)|(?=\s*\n)|(?<!a)$)"
)
_FOLLOWS = re.compile(
    rf"\s+(?:{_FITS}|(?:is|seems|appears|must|would|because|since|as|and|or|but|which|due|given|for|if|when|while|where"
    r"|with|from|in|by|rather|not|instead|based|according|that|only|alone)\b)"
)
_ENDED = r"(?:[)\]]|(?=\s*(?:[^\sA-Za-z'-]|$|\b(?:and|or|because|since|as|depending)\b)))"
_ALSO = re.compile(
    rf"\.?(?:(?i:{_JOINT}{_MAYBE})[(\[]?[A-J]{_ENDED})++"  # "or (C)", ", C and D"; but not "C and D are wrong"
    rf"(?!(?i:{_JOINT}{_MAYBE})[(\[]?[A-J]\b|\s+(?:is|are|was|were|can|do|does|has|have)\b)"
)
_OPTION_WORD = re.compile(r"^(?:option|choice)\s+", re.IGNORECASE)
_QUESTIONED = re.compile(r"[)\]\"'.]*\s*\?")


def _target(text: str, options: _Options) -> _Named | None:
    """What the words after a cue commit to: an option's text, a letter or several; None if they are about else."""
    rest = _FILLER.sub("", text, count=1)
    for words in dict.fromkeys((text.lstrip(" \t\n:"), rest)):
        found = options.starts(words)
        if found is not None:
            return None if _QUESTIONED.match(words, found[1]) else found[0]
    rest = _NOT_BUT.sub("", rest, count=1) if rest.startswith("not") else rest
    if re.match(rf"(?:either|both|between)\s+{_OPTION}{_LABEL}", rest, re.IGNORECASE):
        return _NOTHING
    match = _LETTER.match(rest)
    if match is None or _QUESTIONED.match(rest, match.end()):
        return None
    letter, after = match[match.lastgroup or 0].upper(), rest[match.end() :]
    if match.lastgroup == "capital" and re.match(r"\s+[a-z0-9]", after) and not _FOLLOWS.match(after):
        described = options.starts(after.lstrip())  # an article, "B cells"; but not "B increases", where that is B
        return _Named(letter) if described is not None and described[0].letters == letter else None
    return _NOTHING if _ALSO.match(after) else options.by_letter(letter)


def _statements(text: str, options: _Options, cue: re.Pattern[str], start: int = 0) -> Iterator[tuple[_Named, int]]:
    """What each cue from `start` on commits to, in order, and where the cue ends."""
    for match in cue.finditer(text, start):
        clause = re.split(r"[.,;:!?\n]", text[max(start, match.start() - CLAUSE_CHARS) : match.start()])[-1]
        if not _HEDGE.search(clause + match[0]):
            named = _target(text[match.end() : match.end() + options.reach], options)
            if named is not None:
                yield named, match.end()


def _line(line: str, options: _Options) -> _Named | None:
    """The option that a line is and nothing else: its letter, its text or both."""
    words = _OPTION_WORD.sub("", line.strip())
    if len(words) > options.reach:
        return None
    labelled = _LABELLED.fullmatch(words)
    if labelled is not None and options.by_text(labelled[2]) == _Named(labelled[1], "text"):
        return _Named(labelled[1])
    if _BARE.fullmatch(words) or _SEVERAL.fullmatch(words.rstrip(".")):
        named = options.read(words)
        return named if named is not None and named.letters else None
    return options.by_text(words)


def _committed(text: str, options: _Options) -> tuple[str, _Named] | None:
    """Where a plain text commits to something, and to what: see the module's docstring for the order."""
    boxed = _boxed(text, options)
    if boxed is not None:
        named, end = boxed
        later = [found for cue in (_CUE, _AFTER_ALL) for found in _statements(text, options, cue, end)]
        corrections = [(at, correction) for correction, at in later if _CORRECTION.search(text, end, at)]
        return ("stated", max(corrections, key=lambda found: found[0])[1]) if corrections else ("boxed", named)
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return None
    before, last = (lines[-2] if len(lines) > 1 else ""), _line(lines[-1], options)
    introduced = before.rstrip().endswith(":") and _BARE.fullmatch(lines[-1]) is None  # perhaps a list, cut short
    if last is not None and not introduced and _line(before, options) is None:
        return "line", last
    strong = [named for named, _ in _statements(text, options, _CUE)]
    if strong:
        return "stated", strong[-1]
    first = _line(lines[0], options)
    if first is not None and not any(_line(line, options) for line in lines[1:]):
        return "line", first
    weak = {named.letters: named for cue in (_WEAK_CUE, _AFTER_ALL) for named, _ in _statements(text, options, cue)}
    if weak:
        return "stated", next(iter(weak.values())) if len(weak) == 1 else _NOTHING
    return None
