"""Make the generated parts of the documentation, or with --check fail when one is stale.

docs/cli.md comes from the commands' own help, the tables in README.md, docs/measured.md and docs/scores.md
from benchmarks/results/*.json.
"""

import json
import sys
from pathlib import Path

import click

from textlora.cli import app

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
HEADLINES = {
    "training": 5,
    "time-to-accuracy-imdb": 1,
    "few-rows": 3,
    "imdb": 1,
    "prefix": 3,
    "inference-avx512": 6,
    "inference-avx2": 3,
    "mixed": 3,
    "serving": 3,
    "startup": 2,
    "gpu": 7,
    "comparison": 2,
}  # result file -> its first rows


def cli_reference() -> str:
    parts = ["# Command line", "", "Made from `textlora COMMAND --help` by `make docs`.", ""]
    for name in sorted(app.commands):
        context = click.Context(
            app.commands[name], info_name=f"textlora {name}", terminal_width=110, **app.context_settings
        )
        parts += [f"## {name}", "", "```text", app.commands[name].get_help(context), "```", ""]
    return "\n".join(parts)


def _read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def headlines() -> str:
    """The README's table: the first rows of some results."""
    lines = ["| measured | value | command |", "|---|---|---|"]
    for name, count in HEADLINES.items():
        record = _read(name)
        lines += [f"| {what} | {value} | `{record['command']}` |" for what, value in record["rows"][:count]]
    return "\n".join(lines)


def measured() -> str:
    """Every result, by the command that makes it."""
    parts = [
        "# What was measured",
        "",
        "Made from [benchmarks/results](../benchmarks/results) by `make docs`; scores of more sets are in [scores.md](scores.md).",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        if not path.stem.startswith("set-"):
            record = _read(path.stem)
            machine = f"{record['machine']['processor']}, {record['machine']['cores']} cores, torch {record['machine']['torch']}"
            parts += [
                "",
                f"## {record['claim'][0].upper()}{record['claim'][1:]}",
                "",
                f"`{record['command']}` on {machine}",
                "",
            ]
            picture = ROOT / "docs" / "figures" / f"{path.stem}.svg"
            parts += [f"![{record['claim']}](figures/{picture.name})", ""] if picture.is_file() else []
            parts += [
                "| measured | value |",
                "|---|---|",
                *(f"| {what} | {value} |" for what, value in record["rows"]),
            ]
    return "\n".join([*parts, ""])


def scores() -> str:
    lines = [
        "| set | kind of task | test scores | training rows | epochs | flags of `textlora train` |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted(RESULTS.glob("set-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        (name, shown), details = record["rows"][0], record["details"]
        kind = details["problem_type"].replace("_classification", "").replace("_", "-")
        lines.append(
            f"| {name} | {kind} | {shown} | {details['train_rows']:,} | {details['epochs']:g} | `{details['flags']}` |"
        )
    return "\n".join(lines)


def filled(path: Path, name: str, body: str) -> str:
    """The file's text with what stands between the markers of `name` replaced."""
    start, end = f"<!-- {name}: made by `make docs` -->", f"<!-- end of {name} -->"
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    if not rest or not after:
        raise SystemExit(f"{path.name}: markers of '{name}' are missing")
    return f"{before}{start}\n{body}\n{end}{after}"


def main() -> int:
    pages = {
        ROOT / "docs" / "cli.md": cli_reference(),
        ROOT / "README.md": filled(ROOT / "README.md", "figures", headlines()),
        ROOT / "docs" / "measured.md": measured(),
        ROOT / "docs" / "scores.md": filled(ROOT / "docs" / "scores.md", "scores", scores()),
    }
    stale = [
        path for path, text in pages.items() if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is stale: run `make docs`", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(pages[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
