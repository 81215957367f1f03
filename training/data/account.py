"""The account of a run's rows: which were left out or cut, and why."""

from collections import Counter

from .kinds import KINDS
from .tokens import Tokens

NAMED = 10  # reasons on the screen, at most; all of them are in the files


class Account:
    """Notes for the user, and one entry for each row that is not trained as it stood in the data.

    Attributes:
        skipped: `place` and `reason` of each row left out.
        cut: `place`, `tokens` and `kept` of each row that was cut.
    """

    def __init__(self, data_path: str, cutoff_len: int, long_rows: str):
        self.data_path, self.cutoff_len, self.long_rows = data_path, cutoff_len, long_rows
        self.notes: list[str] = []
        self.skipped: list[dict] = []
        self.cut: list[dict] = []
        self.rows = self.tokens = self.too_long = 0
        self._bad: list[dict] = []
        self._untrained: list[dict] = []

    def note_columns(self, kinds: Counter, unread: list[str]) -> None:
        """Note the columns of each kind, with the number of rows if there are several, and the columns not read."""
        names = [
            f"column{'s' * (len(KINDS[kind]) > 1)} {', '.join(KINDS[kind])}" + f" ({rows} rows)" * (len(kinds) > 1)
            for kind, rows in kinds.items()
        ]
        self.notes.append(f"data: {self.data_path}, {'; '.join(names)}")
        if unread:
            more = f" and {len(unread) - NAMED} more" if len(unread) > NAMED else ""
            self.notes.append(f"columns that are not read: {', '.join(unread[:NAMED])}{more}")

    def leave_out_bad(self, place: str, reason: str) -> None:
        """A row that cannot be used. It counts against `--bad_row_limit`."""
        self.rows += 1
        self._leave_out(self._bad, place, reason)

    def fit(self, place: str, tokens: Tokens) -> Tokens | None:
        """The row within `cutoff_len` tokens; None if it is left out, because it is too long or nothing is trained."""
        self.rows += 1
        length, kept = len(tokens.ids), tokens.cut(self.cutoff_len)
        self.tokens += length
        if length > self.cutoff_len and self.long_rows == "drop":
            self.too_long += 1
            reason = f"too long: {length} tokens, more than --cutoff_len {self.cutoff_len}"
            return self._leave_out([], place, reason)
        if not kept.trained:
            where = f" in the first {self.cutoff_len} of {length} tokens" if length > self.cutoff_len else ""
            return self._leave_out(self._untrained, place, f"nothing to train on{where}")
        if length > self.cutoff_len:
            self.cut.append({"place": place, "tokens": length, "kept": self.cutoff_len})
        return kept

    def check(self, bad_row_limit: float) -> None:
        """Note what was left out and cut.

        Raises:
            ValueError: the share of bad rows is above `bad_row_limit`.
        """
        self.notes += self._notes()
        if len(self._bad) > bad_row_limit * self.rows:
            raise ValueError(
                f"{self._listed('cannot be used', self._bad)}\nthat is more than --bad_row_limit {bad_row_limit:g} of "
                "the rows: repair the data, or raise the limit"
            )

    def text(self) -> str:
        """What was left out and cut, in words."""
        return "\n".join(self._notes())

    def _notes(self) -> list[str]:
        notes = []
        if self._bad:
            notes.append(self._listed("cannot be used", self._bad))
        if self._untrained:
            notes.append(self._listed("are left out, as no token of them would be trained", self._untrained))
        if self.too_long:
            notes.append(
                f"{self.too_long} of {self.rows} rows are left out by --long_rows drop: they have more than "
                f"--cutoff_len {self.cutoff_len} tokens"
            )
        if self.cut:
            lost = sum(row["tokens"] - row["kept"] for row in self.cut)
            notes.append(
                f"{len(self.cut)} of {self.rows} rows have more than --cutoff_len {self.cutoff_len} tokens and are "
                f"cut there: {lost} of {self.tokens} tokens are lost ({lost / self.tokens:.1%}), and the end of each "
                "such row is not learned"
            )
        return notes

    def _leave_out(self, group: list[dict], place: str, reason: str) -> None:
        group.append({"place": place, "reason": reason})
        self.skipped.append({"place": place, "reason": reason})

    def _listed(self, what: str, rows: list[dict]) -> str:
        lines = [f"{len(rows)} of {self.rows} rows {what}:"]
        by_reason: dict[str, list[str]] = {}
        for row in rows:
            by_reason.setdefault(row["reason"], []).append(row["place"])
        for reason, (first, *others) in [*by_reason.items()][:NAMED]:
            lines.append(f"  {first}{f' and {len(others)} more' if others else ''}: {reason}")
        if left := sum(map(len, [*by_reason.values()][NAMED:])):
            lines.append(f"  and {left} more")
        return "\n".join(lines)
