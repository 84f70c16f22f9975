"""
Files of the tasks -> rows: JSON lines, and MMLU's csv.

A row knows the file and the line that it came from. Whatever is wrong with it ends in one line on stderr,
which names both, says what was expected, and gives the command that downloads the file again.
"""
import csv
import io
import json
import re
from pathlib import Path
from typing import Iterator, NoReturn

from plumbing.errors import fail

LETTERS = "ABCD"  # of MMLU's four choices
DOWNLOAD = "python -m tasks.download"


class Row(dict):
    """A row that knows its place in a file, and complains of what it lacks."""

    def __init__(self, where: str, fields: dict):
        super().__init__(fields)
        self.where = where  # file:line

    def bad(self, what: str) -> NoReturn:
        """fail() with the row's place."""
        fail(f"{self.where}: {what}; mend that row, or download the file again: {DOWNLOAD}")

    def bad_field(self, name: str, expected: str) -> NoReturn:
        """fail() with the row's place and what stands in a field."""
        found = json.dumps(self.get(name))[:60]
        self.bad(f"found {found} as {name!r}, expected {expected}")

    def text(self, name: str) -> str:
        """A field that must be a string."""
        value = self.get(name)
        if not isinstance(value, str):
            self.bad_field(name, "a string")
        return value

    def strings(self, name: str, at_least: int = 2) -> list[str]:
        """A field that must be a list of strings."""
        value = self.get(name)
        is_list = isinstance(value, list) and all(isinstance(item, str) for item in value)
        if not is_list or len(value) < at_least:
            self.bad_field(name, f"a list of {at_least} strings or more")
        return value

    def index(self, name: str, n: int, first: int = 0) -> int:
        """A field that must count one of n choices from `first` on, 3 or "3". Returned from 0 on."""
        value = self.get(name)
        is_number = re.fullmatch(r"\d+", str(value))
        if not is_number or not first <= int(value) < first + n:
            self.bad_field(name, f"{first} to {first + n - 1}")
        return int(value) - first


def read_jsonl(path: Path) -> Iterator[Row]:
    """The rows of a file with a JSON object a line. Blank lines are none."""
    with open(path, "rb") as file:  # bytes: text may hold line ends that only Unicode knows
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                fields = dict(json.loads(line.decode("utf-8")))
            except (ValueError, TypeError, RecursionError):
                fail(f"{path}:{number}: found {line[:40]!r}, expected a JSON object in UTF-8; mend "
                     f"that line, or download the file again: {DOWNLOAD}")
            yield Row(f"{path}:{number}", fields)


def read_mmlu_csv(path: Path) -> Iterator[Row]:
    """The rows of one of MMLU's files, as Hugging Face names the fields: question, choices, answer.

    A row of the file is question, A, B, C, D, letter. There is no header; quotes may hold line ends."""
    if not path.is_file():
        fail(f"{path} is no file; expected CSV in UTF-8; download it: {DOWNLOAD}")
    data = path.read_bytes()
    line = 1  # where the next row begins: a row may have several lines
    try:
        text = data.decode("utf-8")
        reader = csv.reader(io.StringIO(text, newline=None))
        for cells in reader:
            if cells:
                yield mmlu_row(cells, f"{path}:{line}")
            line = reader.line_num + 1
    except (UnicodeDecodeError, csv.Error) as error:
        if isinstance(error, UnicodeDecodeError):
            line = data.count(b"\n", 0, error.start) + 1
        fail(f"{path}:{line}: cannot read it ({error}); expected CSV in UTF-8; download it: "
             f"{DOWNLOAD}")


def mmlu_row(cells: list[str], where: str) -> Row:
    """One row of MMLU's csv, from its six columns."""
    if len(cells) != 6 or cells[5] not in list(LETTERS):
        Row(where, {}).bad(f"found {len(cells)} columns that end in {cells[-1][:20]!r}, expected a "
                           "question, four choices and a letter A to D")
    question, *choices, letter = cells
    return Row(where, dict(question=question, choices=choices, answer=LETTERS.index(letter)))
