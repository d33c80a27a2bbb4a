r"""Regular expressions from files of strangers, matched in bounded time.

Python's `re` tries one way after another and can take for ever: (a+)+$ against forty letters is enough. Here all ways
are followed at once: a node of the pattern takes the set of places it may begin at and returns the set of places it may
end at, and every step is counted. Whether a name matches is the same as with `re.fullmatch`, for what is understood:

    x  .  \d \D \w \W \s \S  [a-z]  ^  $  \b \B \A \Z  (...)  (?:...)  a|b  and * + ? {m} {m,n}, lazy (*?) or not

Left out, and refused by name: lookaround, references to groups, flags, possessive quantifiers.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

from entrenar.formats import short

LENGTH, DEPTH = 1000, 20  # characters of a pattern; groups inside each other
STEPS = 1_000_000  # of all that share a budget; a name of a LLaMA takes some hundreds, or none
BRANCHING = re.compile(r"[*+?{|(\[]")  # without these there is one way only, and `re` goes it as fast

Places = frozenset[int]
Node = Callable[["_Run", Places], Places]
QUANTIFIER = re.compile(r"[*+?]|\{(?P<least>\d{0,9})(?P<comma>,?)(?P<most>\d{0,9})\}")
CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]")


class PatternError(ValueError):
    """A pattern that is none, or none that is understood here; or one that takes too long."""


class Budget:
    """The steps that are left for all patterns that share it."""

    def __init__(self, steps: int = STEPS) -> None:
        self.left = steps


class Pattern:
    """A regular expression. Raises PatternError saying what of it is not understood, and where."""

    def __init__(self, text: str, budget: Budget | None = None) -> None:
        self.text, self.budget = text, budget or Budget()
        self._node = _Parser(text).whole()
        self._plain = None if BRANCHING.search(text) else re.compile(text)

    def fullmatch(self, name: str) -> bool:
        """Whether the whole name matches. Raises PatternError where the budget is used up."""
        return self._ends(name, [0])

    def matches_end(self, name: str) -> bool:
        """Whether the whole name matches, or what follows one of its dots. Raises as `fullmatch`."""
        return self._ends(name, [0, *(i + 1 for i, c in enumerate(name) if c == ".")])

    def _ends(self, name: str, starts: list[int]) -> bool:
        if self._plain is not None:
            return any((found := self._plain.match(name, i)) and found.end() == len(name) for i in starts)
        return len(name) in self._node(_Run(name, self), frozenset(starts))


class _Run:
    """One name being matched."""

    def __init__(self, name: str, pattern: Pattern) -> None:
        self.name, self.pattern, self.budget = name, pattern.text, pattern.budget

    def count(self, steps: int) -> None:
        self.budget.left -= steps + 1
        if self.budget.left < 0:
            raise PatternError(f"{short(self.pattern)} takes too long to match {short(self.name)}; write it simpler")


# Nodes


def _one(test: Callable[[str], object]) -> Node:
    def node(run: _Run, at: Places) -> Places:
        run.count(len(at))
        return frozenset(i + 1 for i in at if i < len(run.name) and test(run.name[i]))

    return node


def _place(test: Callable[[str, int], object]) -> Node:
    def node(run: _Run, at: Places) -> Places:
        run.count(len(at))
        return frozenset(i for i in at if test(run.name, i))

    return node


def _sequence(nodes: list[Node]) -> Node:
    def node(run: _Run, at: Places) -> Places:
        for part in nodes:
            if not at:
                break
            at = part(run, at)
        return at

    return node


def _either(nodes: list[Node]) -> Node:
    return lambda run, at: frozenset().union(*(part(run, at) for part in nodes))


def _repeat(inner: Node, least: int, most: int | None) -> Node:
    def node(run: _Run, at: Places) -> Places:
        enough = len(run.name) + 1  # by then nothing is left, or nothing changes any more
        for _ in range(min(least, enough)):
            run.count(0)
            at = inner(run, at)
        reached, new = at, at
        for _ in range(enough if most is None else min(most - least, enough)):
            run.count(0)
            new = inner(run, new) - reached
            if not new:
                break
            reached |= new
        return reached

    return node


# Parsing


class _Parser:
    """Reads a pattern from left to right, one method for each rule of the grammar."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.depth = text, 0, 0
        if len(text) > LENGTH:
            raise PatternError(f"a pattern of {len(text):,} characters; at most {LENGTH:,} are read")

    def fail(self, why: str) -> PatternError:
        return PatternError(f"{short(self.text)}: at character {self.at}: {why}")

    def next(self, word: str) -> bool:
        """Step over `word`, if it is what comes."""
        if self.text.startswith(word, self.at):
            self.at += len(word)
            return True
        return False

    def whole(self) -> Node:
        node = self.alternatives()
        if self.at < len(self.text):
            raise self.fail("a ) that closes nothing")
        return node

    def alternatives(self) -> Node:
        branches = [self.branch()]
        while self.next("|"):
            branches.append(self.branch())
        return branches[0] if len(branches) == 1 else _either(branches)

    def branch(self) -> Node:
        parts = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            parts.append(self.quantified())
        return _sequence(parts)

    def quantified(self) -> Node:
        start = self.at
        node, repeatable = self.atom()
        found = self.quantifier()
        if found is None:
            return node
        if not repeatable:
            self.at = start
            raise self.fail("nothing to repeat")
        if self.next("+"):
            raise self.fail("possessive quantifiers are not understood here")
        self.next("?")  # lazy: another order of trying, the same names
        if self.quantifier() is not None:
            raise self.fail("a quantifier after a quantifier")
        return _repeat(node, *found)

    def quantifier(self) -> tuple[int, int | None] | None:
        found = QUANTIFIER.match(self.text, self.at)
        if found is None or found[0] == "{}":
            return None
        self.at = found.end()
        if found[0] in "*+?":
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[found[0]]
        least = int(found["least"] or 0)
        most = (int(found["most"]) if found["most"] else None) if found["comma"] else least
        if most is not None and most < least:
            raise self.fail(f"{found[0]}: wanted the smaller number first")
        return least, most

    def atom(self) -> tuple[Node, bool]:
        """(node, whether a quantifier may follow)"""
        c = self.text[self.at]
        if c == "(":
            return self.group(), True
        if c == "[":
            return self.letters(), True
        if c == "\\":
            return self.escape()
        if c in "*+?":
            raise self.fail("nothing to repeat")
        self.at += 1
        if c == "^":
            return _place(lambda name, i: i == 0), False
        if c == "$":
            return _place(lambda name, i: i == len(name)), False
        if c == ".":
            return _one(lambda x: x != "\n"), True
        return _one(lambda x: x == c), True

    def group(self) -> Node:
        self.next("(")
        if self.next("?") and not self.next(":"):
            named = re.compile(r"P<[A-Za-z_]\w*>").match(self.text, self.at)
            if named is None:
                raise self.fail("lookaround, flags and references are not understood here; (?:...) is")
            self.at = named.end()
        self.depth += 1
        if self.depth > DEPTH:
            raise self.fail(f"groups more than {DEPTH} deep")
        node = self.alternatives()
        self.depth -= 1
        if not self.next(")"):
            raise self.fail("a ( that is not closed")
        return node

    def letters(self) -> Node:
        found = CLASS.match(self.text, self.at)
        try:
            if found is None:
                raise self.fail("a [ that is not closed")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a later Python may read [[ or -- another way
                test = re.compile(found[0]).fullmatch
        except re.error as error:
            raise self.fail(f"{error}") from None
        self.at = found.end()
        return _one(test)

    def escape(self) -> tuple[Node, bool]:
        if self.at + 1 == len(self.text):
            raise self.fail("a \\ at the end")
        c = self.text[self.at + 1]
        if c in "bBAZ":
            self.at += 2
            test = re.compile(f"\\{c}").match
            return _place(lambda name, i: test(name, i)), False
        if c.isalnum() and c not in "dDwWsS":
            raise self.fail(f"\\{c} is not understood here")
        self.at += 2
        return (_one(re.compile(f"\\{c}").fullmatch) if c.isalnum() else _one(lambda x: x == c)), True
