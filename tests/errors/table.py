"""Runs the cases of bad input and writes what each gives into dpo/ERRORS.md.

python -m tests.errors.table            # rewrites the file
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from pathlib import Path

from dpo.cli import main
from dpo.errors import UserError
from tests.errors.cases import CASES, Case
from tests.train.toy import write_model, write_pairs

TABLE = Path(__file__).parent.parent.parent / "dpo" / "ERRORS.md"
LONGEST = 190
HEAD = """# What bad input gets

Every command ends with exit status 2 and a line that names the file, row, field or flag, what was expected and what
was found; calls from Python raise `UserError` (kernels: `ValueError`) with that line. Nothing is written over, and
nobody sees a traceback. `python -m tests.errors.table` writes this table, and the tests fail where it is not what
happens. `HERE` stands for a folder.

| input | where | what | answer |
|---|---|---|---|
"""


def make_toy(folder: Path) -> Path:
    """A good model, one of a larger vocabulary, data, and a run of two steps with its checkpoint."""
    write_model(folder / "model")
    write_model(folder / "wide", vocab_size=300)
    write_pairs(folder / "pairs.jsonl", count=12)
    write_pairs(folder / "held_out.jsonl", count=3, seed=1)
    words = ["train", "--model", str(folder / "model"), "--data", str(folder / "pairs.jsonl"), "--max-steps", "2"]
    words += ["--output", str(folder / "run"), "--pairs-per-step", "4", "--save-every", "1", "--epochs", "9"]
    with contextlib.redirect_stdout(io.StringIO()):
        main([*words, "--eval-data", str(folder / "held_out.jsonl"), "--log-to", "none"])
    return folder


class Surprise(AssertionError):
    """Bad input that got something else than one line and status 2."""


def answer(case: Case, here: Path, toy: Path) -> str:
    """What a case gives, without the paths of this machine. Raises Surprise for anything but the contract."""
    made = case.make(here, toy)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            if callable(made):
                made()
            else:
                main(made)
    except SystemExit as stop:
        if stop.code != 2:
            raise Surprise(f"{case.name}: exit status {stop.code}") from None
    except (UserError, ValueError) as error:
        if not callable(made):
            raise Surprise(f"{case.name}: {type(error).__name__}: {error}") from error
        errors.write(f"{type(error).__name__}: {error}\n")
    except BaseException as error:
        raise Surprise(f"{case.name}: {type(error).__name__}: {error}") from error
    else:
        raise Surprise(f"{case.name}: went through")
    return _one_line(case, errors.getvalue(), here, toy)


def _one_line(case: Case, text: str, here: Path, toy: Path) -> str:
    """The message of the program."""
    if "Traceback" in text:
        raise Surprise(f"{case.name}: {text[:300]}")
    said = [line for line in text.splitlines() if re.match(r"dpo: |\w+Error: ", line)]
    if len(said) != 1 or len(text.splitlines()) > 1 + text.count("note:"):
        raise Surprise(f"{case.name}: expected one line, found {text!r}")
    line = said[0].removeprefix("dpo: ")
    for folder, name in ((here, "HERE"), (toy, "HERE"), (Path.cwd(), "HERE")):
        line = line.replace(str(folder.resolve()), name).replace(str(folder), name)
    line = re.sub(r"\.writing-\d+-", ".writing-N-", line)
    line = re.sub(r"0x[0-9a-f]+", "0x..", " ".join(line.split()))
    if not line:
        raise Surprise(f"{case.name}: no message in {text!r}")
    return line if len(line) <= LONGEST else line[:LONGEST].rstrip() + " .."


def row(case: Case, line: str) -> str:
    shown = line.replace("\\", "\\\\").replace("|", "\\|").replace("`", "'")
    return f"| {case.category} | {case.entry} | {case.what} | `{shown}` |\n"


def write() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FUSED_DPO_CACHE"] = folder + "/cache"
        toy = make_toy(Path(folder) / "toy")
        rows = []
        for k, case in enumerate(CASES):
            here = Path(folder) / f"case-{k}"
            here.mkdir()
            rows.append(row(case, answer(case, here, toy)))
    TABLE.write_text(HEAD + "".join(rows))


if __name__ == "__main__":
    write()
