"""The rows of a study in a JSON file.

A row is written as soon as it is measured, and one that is there is not measured again: a study
that was interrupted goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cfsp.checkpoint.output import write_atomically
from cfsp.errors import OutputError

Row = dict[str, Any]


class Results:
    """The file of one study.

    Attributes:
        rows: what was measured, in order.
    """

    def __init__(self, path: Path, conditions: Mapping[str, Any]) -> None:
        """Open the file, or begin one.

        Args:
            path: of the file.
            conditions: what all rows have in common, as JSON types.

        Raises:
            OutputError: the file has rows that were measured under other conditions.
        """
        self._path, self._conditions = path, dict(conditions)
        self.rows: list[Row] = []
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["conditions"] != self._conditions:
                raise OutputError(
                    f"{path} was measured under other conditions ({found['conditions']}); choose "
                    "another --out"
                )
            self.rows = found["rows"]

    def measure(
        self, key: Mapping[str, Any], measured: Callable[..., Mapping[str, Any]], *arguments: Any
    ) -> Row:
        """Return the row of this key; measure it if it is not there yet.

        Args:
            key: what tells the row from others, as JSON types.
            measured: gives the rest of the row.
            arguments: of that.
        """
        for row in self.rows:
            if all(name in row and row[name] == value for name, value in key.items()):
                return row
        row = {**key, **measured(*arguments)}
        self.rows.append(row)
        self._save()
        print(json.dumps(row), flush=True)
        return row

    def _save(self) -> None:
        # One row a line, so that a difference between two runs shows.
        lines = ",\n    ".join(json.dumps(row) for row in self.rows)
        conditions = json.dumps(self._conditions, indent=4).replace("\n", "\n  ")
        text = f'{{\n  "conditions": {conditions},\n  "rows": [\n    {lines}\n  ]\n}}\n'
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, text.encode())
