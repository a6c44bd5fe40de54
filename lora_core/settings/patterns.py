"""Patterns over layer names: the common part of regular expressions, matched in bounded time.

Patterns also come from files of other people: a LoRA's header, a config, a run folder. Python's `re`
backtracks: a pattern such as `(\\w+)+!` blocks the process for hours, with the interpreter's lock held. Here
a pattern becomes an automaton that reads the name once (Thompson 1968): slower than `re` on a good pattern,
never slow on a bad one. What needs backtracking (look-around, back-references) is refused.

Supported: literals, `.`, `[a-z]`, `[^a-z]`, `\\d \\w \\s` and their opposites, `|`, `( )`, `(?: )`,
`* + ? {m,n}`, `^ $ \\A \\Z \\b`. A pattern means what it means to `re.search`.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from lora_core.errors import ConfigError

LONGEST = 200
"""Characters of a pattern."""
MOST = 100
"""Patterns of one table."""
MOST_STATES = 400
DEEPEST = 16
"""Groups within groups."""
MOST_STEPS = 50_000
"""States that one `Pattern` visits outside of its memo, about 0.05 s; usual patterns visit under 1,000."""

T = TypeVar("T")
Test = Callable[[str], bool]


class PatternError(ConfigError):
    """A pattern that cannot be used; the text is the reason, without a full stop."""


@dataclass(frozen=True)
class _Char:
    """Matches one character."""

    test: Test
    literal: str = ""


@dataclass(frozen=True)
class _Assert:
    """Matches no character; holds between certain characters, "" being an end of the text."""

    holds: Callable[[str, str], bool]


@dataclass(frozen=True)
class _Fork:
    """Matches no character; continues at each of these states."""

    to: tuple[int, ...]


@dataclass(frozen=True)
class _Sequence:
    parts: tuple["_Node", ...]


@dataclass(frozen=True)
class _Either:
    branches: tuple["_Node", ...]


@dataclass(frozen=True)
class _Repeat:
    part: "_Node"
    least: int
    most: int | None


_Node = _Char | _Assert | _Sequence | _Either | _Repeat
_State = _Char | _Assert | _Fork | None
"""None: the pattern is found."""


def _opposite(test: Test) -> Test:
    return lambda char: not test(char)


def _between(low: str, high: str) -> Test:
    return lambda char: low <= char <= high


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"


_CLASSES: dict[str, Test] = {"d": str.isdecimal, "w": _is_word, "s": str.isspace}
_CLASSES |= {key.upper(): _opposite(test) for key, test in _CLASSES.items()}
_ASSERTS: dict[str, Callable[[str, str], bool]] = {
    "A": lambda before, after: not before,
    "Z": lambda before, after: not after,
    "b": lambda before, after: _is_word(before) != _is_word(after),
}
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r"}


class Pattern:
    """One pattern, compiled to search many names."""

    def __init__(self, text: str) -> None:
        """Compile the pattern.

        Raises:
            PatternError: it cannot be used.
        """
        self.text = text
        self._states, self._literal = _compiled(text)
        self._memo: dict[tuple[int, str, str], int] = {}
        self._steps = 0

    def search(self, name: str) -> bool:
        """Whether the pattern is found anywhere in `name`.

        Raises:
            PatternError: it takes too many steps.
        """
        if self._literal is not None:
            return self._literal in name
        live, before = 0, ""
        for char in (*name, ""):
            key = (live, before, char)
            after = self._memo.get(key)
            if after is None:
                after = self._memo[key] = self._step(*key)
            if after < 0:
                return True
            live, before = after, char
        return False

    def _step(self, live: int, before: str, char: str) -> int:
        """The states, as bits, after one more character; -1 if the pattern is found before it."""
        seen, left, after = 0, live | 1, 0
        while left:
            bit = left & -left
            left ^= bit
            seen |= bit
            number = bit.bit_length() - 1
            self._steps += 1
            match self._states[number]:
                case None:
                    return -1
                case _Char(test):
                    if char and test(char):
                        after |= bit << 1
                case _Assert(holds):
                    if holds(before, char):
                        left |= (bit << 1) & ~seen
                case _Fork(to):
                    for other in to:
                        left |= (1 << other) & ~seen
        if self._steps > MOST_STEPS:
            raise PatternError("it takes too long to match; make it simpler")
        return after


def last_matches(table: Mapping[str, T], names: Iterable[str]) -> dict[str, T]:
    """For each name that a pattern of the table is found in, the value of the last such pattern.

    Raises:
        PatternError: a pattern cannot be used.
    """
    return _last_matches(tuple(table.items()), tuple(names)) if table else {}


@functools.lru_cache(maxsize=16)
def _last_matches(table: tuple[tuple[str, T], ...], names: tuple[str, ...]) -> dict[str, T]:
    found: dict[str, T] = {}
    for text, value in table:
        pattern = Pattern(text)
        found |= {name: value for name in names if pattern.search(name)}
    return found


def check_pattern(text: str) -> None:
    """Refuse a text that is not a pattern.

    Raises:
        PatternError: says why.
    """
    _compiled(text)


@functools.lru_cache(maxsize=512)
def _compiled(text: str) -> tuple[tuple[_State, ...], str | None]:
    """The automaton, and the literal text if the pattern is one."""
    if len(text) > LONGEST:
        raise PatternError(f"it is longer than {LONGEST} characters")
    node = _Reader(text).read()
    program = _Program()
    program.add(node)
    parts = node.parts if isinstance(node, _Sequence) else (node,)
    literal = "".join(part.literal if isinstance(part, _Char) else "" for part in parts)
    return (*program.states, None), literal if len(literal) == len(parts) else None


class _Program:
    """The states of an automaton; each leads to the next unless it is a fork."""

    def __init__(self) -> None:
        self.states: list[_State] = []
        self._added = 0

    def add(self, node: _Node) -> None:
        # An empty part adds no state and can still be repeated without end.
        self._added += 1
        if max(self._added, len(self.states)) > MOST_STATES:
            raise PatternError("it is too large; make it simpler")
        match node:
            case _Sequence(parts):
                for part in parts:
                    self.add(part)
            case _Either(branches):
                self._add_either(branches)
            case _Repeat(part, least, most):
                for _ in range(least):
                    self.add(part)
                if most is None:
                    self._add_loop(part)
                else:
                    for _ in range(most - least):
                        self._add_either((part, _Sequence(())))
            case _:
                self.states.append(node)

    def _add_either(self, branches: tuple[_Node, ...]) -> None:
        start = len(self.states)
        self.states.append(None)
        begins, ends = [], []
        for branch in branches:
            begins.append(len(self.states))
            self.add(branch)
            ends.append(len(self.states))
            self.states.append(None)
        self.states[start] = _Fork(tuple(begins))
        for end in ends:
            self.states[end] = _Fork((len(self.states),))

    def _add_loop(self, part: _Node) -> None:
        start = len(self.states)
        self.states.append(None)
        self.add(part)
        self.states.append(_Fork((start,)))
        self.states[start] = _Fork((start + 1, len(self.states)))


class _Reader:
    """Reads the text of a pattern by recursive descent."""

    def __init__(self, text: str) -> None:
        self._text, self._place, self._depth = text, 0, 0

    def read(self) -> _Node:
        node = self._either()
        if self._place < len(self._text):
            raise PatternError("a bracket is closed that was not opened")
        return node

    def _next(self) -> str:
        return self._text[self._place : self._place + 1]

    def _take(self) -> str:
        char = self._next()
        if not char:
            raise PatternError("it ends in the middle")
        self._place += 1
        return char

    def _took(self, text: str) -> bool:
        """Whether `text` comes next; it is taken then."""
        found = self._text.startswith(text, self._place)
        self._place += len(text) * found
        return found

    def _either(self) -> _Node:
        branches = [self._sequence()]
        while self._took("|"):
            branches.append(self._sequence())
        return branches[0] if len(branches) == 1 else _Either(tuple(branches))

    def _sequence(self) -> _Node:
        parts: list[_Node] = []
        while self._next() not in ("", "|", ")"):
            if self._times() is not None:
                raise PatternError("there is nothing to repeat")
            parts.append(self._repeated(self._one()))
        return parts[0] if len(parts) == 1 else _Sequence(tuple(parts))

    def _repeated(self, part: _Node) -> _Node:
        times = self._times()
        if times is None:
            return part
        if isinstance(part, _Assert):
            raise PatternError("there is nothing to repeat")
        if self._next() == "+":
            raise PatternError("repetitions that end in + are not known here")
        self._took("?")
        return _Repeat(part, *times)

    def _times(self) -> tuple[int, int | None] | None:
        """How often the part before is repeated, or None where no repetition comes next."""
        for mark, times in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._took(mark):
                return times
        end = self._text.find("}", self._place)
        least, comma, most = self._text[self._place + 1 : end].partition(",")
        numbers = [number for number in (least, most) if number]
        if self._next() != "{" or end < 0 or not (numbers or comma):
            return None
        if not all(number.isascii() and number.isdecimal() for number in numbers):
            return None
        self._place = end + 1
        if any(int(number) > MOST_STATES for number in numbers):
            raise PatternError("it is too large; make it simpler")
        low = int(least or 0)
        high = int(most) if most else None if comma else low
        if high is not None and high < low:
            raise PatternError("a repetition ends before it begins")
        return low, high

    def _one(self) -> _Node:
        char = self._take()
        match char:
            case "(":
                return self._group()
            case "[":
                return self._class()
            case ".":
                return _Char(lambda found: found != "\n")
            case "^":
                return _Assert(_ASSERTS["A"])
            case "$":
                return _Assert(_ASSERTS["Z"])
            case "\\":
                return self._escaped()
        return _Char(char.__eq__, char)

    def _group(self) -> _Node:
        if self._took("?") and not self._took(":"):
            raise PatternError("groups that begin with (? are not known here, except (?:")
        self._depth += 1
        if self._depth > DEEPEST:
            raise PatternError(f"more than {DEEPEST} groups lie within each other")
        node = self._either()
        if not self._took(")"):
            raise PatternError("a group is not closed")
        self._depth -= 1
        # A group can be repeated even if it is empty or an assertion.
        return _Sequence((node,))

    def _escaped(self) -> _Node:
        char = self._take()
        if char in _CLASSES:
            return _Char(_CLASSES[char])
        if char in _ASSERTS:
            return _Assert(_ASSERTS[char])
        plain = self._plain(char)
        return _Char(plain.__eq__, plain)

    def _plain(self, char: str) -> str:
        """The character that an escaped one means."""
        if char in _CONTROLS:
            return _CONTROLS[char]
        if char.isalnum() and char.isascii():
            raise PatternError(f"\\{char} is not known here")
        return char

    def _class(self) -> _Node:
        negated = self._took("^")
        tests: list[Test] = []
        first = True
        while first or self._next() != "]":
            first = False
            low = self._class_letter()
            if self._next() == "-" and self._text[self._place + 1 : self._place + 2] not in ("", "]"):
                self._place += 1
                high = self._class_letter()
                if not isinstance(low, str) or not isinstance(high, str) or high < low:
                    raise PatternError("a range of characters ends before it begins")
                tests.append(_between(low, high))
            else:
                tests.append(low.__eq__ if isinstance(low, str) else low)
        self._take()
        return _Char(lambda found: any(test(found) for test in tests) != negated)

    def _class_letter(self) -> str | Test:
        char = self._take()
        if char != "\\":
            return char
        char = self._take()
        return _CLASSES.get(char) or self._plain(char)
