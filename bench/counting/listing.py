"""Loops in a listing of machine code, and which loop of the source each of them is.

A loop of the source is found again by its lines, which the compiler keeps beside the code.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .trips import Loop

ALIKE = 0.2
"""The least share of lines that a loop and its source have in common. A wait has one line of a loop's many."""


class Span(NamedTuple):
    """A loop: indices of its first and last line."""

    first: int
    last: int

    def holds(self, other: "Span") -> bool:
        return self != other and self.first <= other.first and other.last <= self.last


class Listing(NamedTuple):
    """Of each line its place in the source (file.py:line); the accesses to global memory; loops, outer ones first."""

    places: tuple[str, ...]
    accesses: frozenset[int]
    loops: tuple[Span, ...]

    def own(self, span: Span) -> set[int]:
        """Lines in the loop, and in no loop inside it."""
        inner = (range(other.first, other.last + 1) for other in self.loops if span.holds(other))
        return set(range(span.first, span.last + 1)).difference(*inner)

    def accesses_in(self, span: Span, places: frozenset[str]) -> int:
        """Accesses of these places in the loop, and in no loop inside it."""
        return sum(self.places[i] in places for i in self.accesses & self.own(span))


def loops_of(heads: Mapping[str, int], branches: Mapping[int, str]) -> tuple[Span, ...]:
    """From each label that is branched back to, to the last such branch."""
    ends = {heads[label]: i for i, label in sorted(branches.items()) if heads.get(label, i) < i}
    return tuple(sorted((Span(*loop) for loop in ends.items()), key=lambda span: (span.first, -span.last)))


def matched(listing: Listing, loops: Sequence[Loop]) -> dict[Span, int | None]:
    """Of each loop of the listing, the index of its source; None for one that has none."""
    found: dict[Span, int | None] = {}
    for span in listing.loops:
        around = [found[other] for other in listing.loops if other.holds(span)]
        parent = next((index for index in reversed(around) if index is not None), None)
        places = {listing.places[i] for i in listing.own(span)}
        # Of equal ones that which is not found yet.
        candidates = [
            (len(places & loop.places) / len(places | loop.places), index not in found.values(), -index)
            for index, loop in enumerate(loops)
            if loop.parent == parent
        ]
        alike, _, index = max(candidates, default=(0.0, False, 0))
        found[span] = -index if alike >= ALIKE else None
    return found
