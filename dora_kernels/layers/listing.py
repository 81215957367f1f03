"""Lines on many layers, shortened: equal layers of a stack are one line with a count."""

import re
from collections.abc import Iterable, Mapping

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$|[^\w.])")
"""A module's place in a stack, as paths write it: the 3 of "model.layers.3.mlp"."""


def grouped(lines: Iterable[str]) -> list[str]:
    """Lines that differ in a module's place alone are one, with `*` for the place and how many they were."""
    found: dict[str, list[str]] = {}
    for line in lines:
        found.setdefault(NUMBER.sub("*", line), []).append(line)
    return [own[0] if len(own) == 1 else f"{pattern} [{len(own)} alike]" for pattern, own in found.items()]


def total(counts: Mapping[str, int]) -> str:
    """What all layers together come to: "14 layers: 12 fused, 2 left to PEFT"."""
    parts = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f"{sum(counts.values())} layers: {parts}"
