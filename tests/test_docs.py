"""The documentation tells the truth: generated parts are fresh, links lead somewhere, the example data are as
their card says."""

import csv
import itertools
import json
import re
import runpy
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import textlora
from textlora.cli import run

ROOT = Path(__file__).resolve().parent.parent
REVIEWS = ROOT / "examples" / "film-reviews"
PAGES = [
    p for p in ROOT.rglob("*.md") if not {".venv", "build", "demo", ".git"} & set(p.relative_to(ROOT).parts)
]


def test_generated_parts_are_fresh(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "docs" / "generate.py"), run_name="__main__")
    assert capsys.readouterr().err == ""
    assert ended.value.code == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", prose)
    assert [t for t in targets if not (page.parent / t).exists()] == []


def test_every_flag_in_the_readme_exists():
    reference = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^\$? ?(?:.*\| )?textlora .*$", text, flags=re.MULTILINE)
    assert commands, "the README shows no command"
    for command in commands:
        for flag in re.findall(r"--[a-z][a-z-]+", command):
            assert flag in reference, f"{flag} in: {command}"


def test_make_targets_in_the_docs_exist():
    targets = set(
        re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    )
    for page in PAGES:
        assert set(re.findall(r"`make ([\w-]+)`", page.read_text(encoding="utf-8"))) <= targets, page


def _reviews(name: str) -> list[dict[str, str]]:
    with open(REVIEWS / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_example_reviews_are_as_their_card_says():
    train, test = _reviews("train.csv"), _reviews("test.csv")
    card = (REVIEWS / "README.md").read_text(encoding="utf-8")
    for name, rows in (("train.csv", train), ("test.csv", test)):
        counts = Counter(row["label"] for row in rows)
        assert f"| {name} | {len(rows):,} | {counts['positive']:,} | {counts['negative']:,} |" in card
    for kind, count in Counter(row["kind"] for row in train + test).items():
        assert f"| {kind} | {count:,} |" in card
    assert len(train) + len(test) >= 600


def test_example_reviews_are_not_near_copies():
    """No two share more than 0.3 of their word 5-grams (Jaccard); only pairs with a common 5-gram can."""
    grams = []
    for row in _reviews("train.csv") + _reviews("test.csv"):
        words = re.findall(r"\w+", row["text"].lower())
        grams.append({tuple(words[i : i + 5]) for i in range(len(words) - 4)})
    holders: dict[tuple[str, ...], list[int]] = {}
    for i, mine in enumerate(grams):
        for gram in mine:
            holders.setdefault(gram, []).append(i)
    pairs = {pair for members in holders.values() for pair in itertools.combinations(members, 2)}
    assert max((len(grams[a] & grams[b]) / len(grams[a] | grams[b]) for a, b in pairs), default=0) <= 0.3


def _block(after: str, language: str) -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition(after)[2]
    found = re.search(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
    assert found, f"no {language} block after '{after}'"
    return found.group(1)


def test_readme_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [
        ("a warm and funny film", "good"),
        ("two dull hours, wasted", "bad"),
        ("I would see it again", "good"),
        ("I walked out", "bad"),
    ]
    for name, count in (("reviews.csv", 10), ("test.csv", 2), ("new.csv", 1)):
        with open(name, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"] if name != "new.csv" else ["text"])
            writer.writerows(
                [
                    (f"{text} {i}", label)[: 2 if name != "new.csv" else 1]
                    for i in range(count)
                    for text, label in rows
                ]
            )
    for line in _block("## Train on your own text", "bash").splitlines():
        assert run(shlex.split(line)[1:]) == 0, f"{line}: {capsys.readouterr().err}"
    with open(tmp_path / "labelled.csv", encoding="utf-8") as file:
        labelled = list(csv.DictReader(file))
    assert [row["text"] for row in labelled] == [f"{text} 0" for text, _ in rows]
    assert {row["label"] for row in labelled} <= {"good", "bad"}
    quick = {
        "compare": "--methods tfidf,lora-qv --learning-rates 1e-3 --seeds 1 --epochs 1",
        "tune": "--trials 2 --epochs 1",
    }  # the last flag wins
    for line in _block("## Compare and tune", "bash").splitlines():
        words = shlex.split(line)[1:]
        assert run([*words, *quick[words[0]].split()]) == 0, f"{line}: {capsys.readouterr().err}"
    for line in _block("## Take it elsewhere", "bash").splitlines():
        assert run(shlex.split(line)[1:]) == 0, f"{line}: {capsys.readouterr().err}"
    capsys.readouterr()
    exec(_block("## Many adapters, one base", "python"), {})
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert first.split()[0] in ("good", "bad")


def test_readme_serving_answers(tmp_path, monkeypatch):
    """The server starts as the README says, and its curl lines get answers."""
    monkeypatch.chdir(tmp_path)
    rows = [("a warm and funny film", "good"), ("two dull hours, wasted", "bad")] * 10
    textlora.train(rows, output="my-adapter", epochs=1)
    serve, *requests = _block("## Serve them", "bash").splitlines()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code = "import textlora.cli; textlora.cli.main()"
    command = [sys.executable, "-c", code, *shlex.split(serve.replace("8000", port))[1:]]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        try:
            answers = []
            for line in requests:
                assert line.startswith("curl -s localhost:8000/"), line
                words = shlex.split(line)
                body = words[words.index("-d") + 1].encode() if "-d" in words else None
                url = "http://" + words[2].replace("localhost:8000", f"127.0.0.1:{port}")
                answers.append(_patiently(url, body, server))
        finally:
            server.terminate()
            server.communicate(timeout=60)
    assert {score["label"] for score in answers[0]} == {"good", "bad"}
    assert [model["id"] for model in answers[1]["data"]] == ["reviews"]


def _patiently(url: str, body: bytes | None, server: subprocess.Popen) -> Any:
    """The JSON answer of a server that may still be starting."""
    while True:
        try:
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"} if body else {})
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError:
            assert server.poll() is None, server.communicate()[1]
            time.sleep(0.1)


def test_readme_snippet_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(_block("goes on with", "python"), {})
    assert capsys.readouterr().out.strip() == "delivery"
