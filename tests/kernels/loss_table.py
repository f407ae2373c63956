"""The table of losses in kernels/README.md, from the registry.

    python -m tests.kernels.loss_table

writes it between its two marks; a test fails where the file says something else.
"""

from pathlib import Path

from dpo_kernels import LOSSES, OPTIONS

README = Path(__file__).resolve().parents[2] / "kernels" / "README.md"
START, END = "<!-- losses -->\n", "<!-- /losses -->\n"


def table() -> str:
    lines = ["| loss | formula | options | needs | paper |", "|---|---|---|---|---|"]
    for name, entry in LOSSES.items():
        options = ", ".join(f"`{key}={value}`" for key, value in entry.options.items() if OPTIONS[key].plain != value)
        plain = ", ".join(f"`{key}`" for key, value in entry.options.items() if OPTIONS[key].plain == value)
        needs = [] if not entry.reference else ["reference"]
        needs += ["lengths"] if entry.mean or entry.options.get("token_reduction") == "mean" else []
        needs += [{"batch": "the batch", "state": "a baseline"}[entry.coupled]] if entry.coupled else []
        text = entry.text.replace("|", "\\|")
        both = "; ".join(filter(None, (options, plain)))
        lines.append(f"| `{name}` | {text} | {both} | {', '.join(needs)} | {entry.paper} |")
    lines += ["", "| option | meaning | values |", "|---|---|---|"]
    lines += [f"| `{name}` | {option.meaning} | {option.expected} |" for name, option in OPTIONS.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    text = README.read_text()
    before, rest = text.split(START)
    README.write_text(before + START + table() + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
