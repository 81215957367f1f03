"""Columns under other names, and prompts from a template: `columns:` and `prompt_template:` of a run."""

import re
from dataclasses import dataclass, field

from .formats import SourceRow

PLACEHOLDER = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class Mapping:
    """How the data's columns become those that are read.

    Args:
        columns: the data's name of a column by ours: {"completion": "antwort"}.
        template: a text with `{column}` places; it becomes the column `prompt`.
    """

    columns: dict[str, str] = field(default_factory=dict)
    template: str = ""

    def apply(self, data_path: str, splits: dict[str, list[SourceRow]]) -> dict[str, list[SourceRow]]:
        """The rows with our columns. A row that lacks a column of the template has a problem.

        Raises:
            ValueError: a column that no row has.
        """
        known = {str(name) for rows in splits.values() for row in rows if row.values for name in row.values}
        flags = dict.fromkeys(self.columns.values(), "--columns")
        flags |= dict.fromkeys(PLACEHOLDER.findall(self.template), "--prompt_template")
        for name, flag in flags.items():
            if known and name not in known:
                raise ValueError(f"`{flag}` names {name!r}, but `--data_path` {data_path} has {sorted(known)[:20]}")
        return {split: [self._row(row) for row in rows] for split, rows in splits.items()}

    def _row(self, row: SourceRow) -> SourceRow:
        if row.values is None:
            return row
        renamed = {ours: row.values[theirs] for ours, theirs in self.columns.items() if theirs in row.values}
        values = {name: value for name, value in row.values.items() if name not in self.columns.values()} | renamed
        if not self.template:
            return SourceRow(row.place, values, row.problem, row.weight)
        for name in PLACEHOLDER.findall(self.template):
            if not isinstance(value := row.values.get(name), str | int | float):
                kind = "is missing" if value is None else f"should be text, got {type(value).__name__}"
                return SourceRow(row.place, None, f"`{name}` of the prompt template {kind}", row.weight)
        values["prompt"] = PLACEHOLDER.sub(lambda found: str(row.values[found[1]]), self.template)
        return SourceRow(row.place, values, row.problem, row.weight)
