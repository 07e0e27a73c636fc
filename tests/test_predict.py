"""`textlora predict`: what goes in comes out in the same form and order, with the answer added; what cannot
be read is said."""

import csv
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import Cli, Trained, single_rows, trained, write_csv

import textlora.inference.predict
from textlora import TextClassifier
from textlora.core.errors import UsageError


def with_meta(classifier: TextClassifier, **changes: Any) -> TextClassifier:
    """The same classifier with some of its stored facts replaced."""
    return TextClassifier(classifier.model, classifier.tokenizer, replace(classifier.meta, **changes))


@pytest.fixture
def multi(tiny_base, tmp_path_factory) -> Trained:
    return trained(tiny_base, tmp_path_factory, task="multi")


@pytest.fixture
def regression(tiny_base, tmp_path_factory) -> Trained:
    return trained(tiny_base, tmp_path_factory, task="regression")


@pytest.fixture
def pairs(tiny_base, tmp_path_factory) -> Trained:
    return trained(tiny_base, tmp_path_factory, task="pairs")


TEXTS = [text for text, _ in single_rows(11, seed=8)]


def answers(
    run: Trained, texts: list[str] = TEXTS, others: list[str] | None = None
) -> list[tuple[str, dict[str, float], list[float]]]:
    """(label, scores, logits) computed here from the logits of each text alone."""
    classifier = TextClassifier.load(run.folder, base=run.config.model)
    found = []
    for i, text in enumerate(texts):
        logits = classifier.logits([text], None if others is None else [others[i]])[0].astype(np.float64)
        p = np.exp(logits / classifier.meta.temperature)
        p /= p.sum()
        found.append(
            (
                classifier.meta.labels[int(p.argmax())],
                dict(zip(classifier.meta.labels, p.tolist(), strict=True)),
                logits.tolist(),
            )
        )
    return found


def predict(cli: Cli, run: Trained, data: object, *flags: object, code: int = 0) -> tuple[str, str]:
    found, out, err = cli("predict", run.folder, "--data", data, "--device", "cpu", *flags)
    assert found == code, err
    return out, err


def near(row: dict[str, Any], scores: dict[str, float]) -> bool:
    return all(abs(float(row[f"score_{label}"]) - value) < 1e-5 for label, value in scores.items())


def test_csv_to_standard_output(cli, single, tmp_path):
    path = write_csv(
        tmp_path / "in.csv", [(i, text, 'x,\n"y"') for i, text in enumerate(TEXTS)], ("id", "review", "note")
    )
    out, err = predict(cli, single, path)
    assert err == ""
    rows = list(csv.DictReader(io.StringIO(out)))
    assert list(rows[0]) == ["id", "review", "note", "label", "score", "score_neg", "score_pos"]
    expected = answers(single)
    for i, row in enumerate(rows):
        label, scores, _ = expected[i]
        assert (row["id"], row["review"], row["note"], row["label"]) == (str(i), TEXTS[i], 'x,\n"y"', label)
        assert near(row, scores)
        assert float(row["score"]) == float(row[f"score_{label}"])
    assert {label for label, _, _ in expected} == {"neg", "pos"}


def test_a_column_named_label_is_kept(cli, single, tmp_path):
    path = write_csv(tmp_path / "in.csv", [(text, "mine") for text in TEXTS])
    out, _ = predict(cli, single, path)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert list(rows[0]) == ["text", "label", "label_predicted", "score", "score_neg", "score_pos"]
    assert [(row["label"], row["label_predicted"]) for row in rows] == [
        ("mine", label) for label, _, _ in answers(single)
    ]


@pytest.mark.parametrize("name", ["in.csv", "in.tsv", "in.jsonl", "in.parquet", "semicolon.csv"])
def test_every_format_gives_the_same_answers_in_its_own_form(cli, single, tmp_path, name):
    path, output = tmp_path / name, tmp_path / f"out{Path(name).suffix}"
    rows = [{"n": i, "text": text} for i, text in enumerate(TEXTS)]
    if name.endswith("jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        mark = {"in.tsv": "\t", "semicolon.csv": ";"}.get(name, ",")
        path.write_text(
            f"n{mark}text\n" + "".join(f"{row['n']}{mark}{row['text']}\n" for row in rows), encoding="utf-8"
        )
    out, err = predict(cli, single, path, "--output", output)
    assert (out, err) == ("", "")
    if name.endswith("jsonl"):
        found = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    elif name.endswith("parquet"):
        found = pq.read_table(output).to_pylist()
        assert pq.read_schema(output).field("n").type == pa.int64()
    else:
        mark = {"in.tsv": "\t", "semicolon.csv": ";"}.get(name, ",")
        with open(output, encoding="utf-8", newline="") as file:
            found = list(csv.DictReader(file, delimiter=mark))
    expected = answers(single)
    assert [list(row) for row in found] == [["n", "text", "label", "score", "score_neg", "score_pos"]] * 11
    assert [(int(row["n"]), row["text"], row["label"]) for row in found] == [
        (i, TEXTS[i], expected[i][0]) for i in range(11)
    ]
    assert all(near(row, scores) for row, (_, scores, _) in zip(found, expected, strict=True))


def test_output_extension_decides_the_form(cli, single, tmp_path):
    path = write_csv(tmp_path / "in.csv", [(text,) for text in TEXTS], ("text",))
    predict(cli, single, path, "--output", tmp_path / "out.jsonl")
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["text"], row["label"]) for row in found] == [
        (text, label) for text, (label, _, _) in zip(TEXTS, answers(single), strict=True)
    ]
    assert cli.fails("predict", single.folder, "--data", path, "--output", tmp_path / "out.xlsx").startswith(
        "unknown kind of file: out.xlsx; known are "
    )
    assert not (tmp_path / "out.xlsx").exists()


def test_json_and_logits(cli, single, tmp_path):
    path = write_csv(tmp_path / "in.csv", [(text,) for text in TEXTS], ("text",))
    out, err = predict(cli, single, path, "--json", "--logits")
    assert err == ""
    found = [json.loads(line) for line in out.splitlines()]
    for row, (label, scores, logits) in zip(found, answers(single), strict=True):
        assert list(row) == ["label", "score", "scores", "logits"]
        assert row["label"] == label
        assert row["score"] == row["scores"][label]
        assert np.allclose([row["scores"][name] for name in scores], list(scores.values()), atol=1e-5)
        assert np.allclose(row["logits"], logits, atol=1e-5)
    out, _ = predict(cli, single, path, "--json")
    assert list(json.loads(out.splitlines()[0])) == ["label", "score", "scores"]
    assert cli.fails("predict", single.folder, "--data", path, "--json", "--output", tmp_path / "x.csv") == (
        "--json prints to standard output; leave out --output, or name a .jsonl file without --json"
    )


def test_bad_rows_are_said_and_left_out(cli, single, tmp_path):
    path = tmp_path / "in.csv"
    path.write_bytes(
        b'id,text\n1,good fun film\n2,too,many\n3,\n4,  \n5,caf\xe9\n6,dull film\n7\n8,"a "b" c"\n9,great plot\n'
    )
    output = tmp_path / "out.csv"
    out, err = predict(cli, single, path, "--output", output)
    assert out == ""
    said = err.splitlines()
    assert [line.split(": ")[1] for line in said[:-1]] == [f"in.csv line {n}" for n in (3, 4, 5, 6, 8, 9)]
    assert said[0] == "textlora: in.csv line 3: 3 fields where the header has 2; row skipped"
    assert said[3] == "textlora: in.csv line 6: byte 0xe9 is not utf-8; row skipped"
    assert said[-1] == "textlora: 6 rows skipped"
    with open(output, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = answers(single, ["good fun film", "dull film", "great plot"])
    assert [(row["id"], row["label"]) for row in rows] == [
        (i, label) for i, (label, _, _) in zip("169", expected, strict=True)
    ]
    output.unlink()
    predict(cli, single, path, "--output", output, "--strict", code=2)
    assert len(output.read_text(encoding="utf-8").splitlines()) == 4


def test_strict_with_good_rows_only(cli, single, tmp_path):
    path = write_csv(tmp_path / "in.csv", [(text,) for text in TEXTS], ("text",))
    out, err = predict(cli, single, path, "--strict")
    assert (len(out.splitlines()), err) == (12, "")


def test_many_bad_rows_are_counted_not_listed(cli, single, tmp_path):
    path = write_csv(tmp_path / "in.csv", [("good fun",), *([("",)] * 50)], ("text",))
    path.write_text("text\ngood fun\n" + '""\n' * 50, encoding="utf-8")
    _, err = predict(cli, single, path)
    assert len(err.splitlines()) == 21
    assert err.splitlines()[-1] == "textlora: 50 rows skipped"


def test_header_only_gives_a_header_only(cli, single, tmp_path):
    path = write_csv(tmp_path / "in.csv", [], ("id", "text"))
    out, err = predict(cli, single, path)
    assert (out, err) == ("id,text,label,score,score_neg,score_pos\n", "")
    predict(cli, single, path, "--output", tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text(encoding="utf-8") == out
    out, err = predict(cli, single, path, "--json")
    assert (out, err) == ("", "")


def test_order_is_kept_across_windows(cli, single, tmp_path, monkeypatch):
    monkeypatch.setattr(textlora.inference.predict, "WINDOW", 7)
    texts = [
        " ".join(["good", "dull", "film", "very"][i % 4] for _ in range(1 + i * 5 % 23)) for i in range(40)
    ]
    rows = [(i, "" if i % 9 == 4 else text) for i, text in enumerate(texts)]
    path = write_csv(tmp_path / "in.csv", rows, ("id", "text"))
    out, err = predict(cli, single, path)
    found = list(csv.DictReader(io.StringIO(out)))
    kept = [(i, text) for i, text in rows if text]
    assert [(int(row["id"]), row["text"]) for row in found] == kept
    assert err.splitlines()[-1] == "textlora: 4 rows skipped"
    expected = answers(single, [text for _, text in kept])
    assert [row["label"] for row in found] == [label for label, _, _ in expected]
    assert all(near(row, scores) for row, (_, scores, _) in zip(found, expected, strict=True))


def test_lines_from_standard_input_one_json_object_each(single):
    """The real command in a pipe."""
    code = "import textlora.cli; textlora.cli.main()"
    arguments = [
        sys.executable,
        "-c",
        code,
        "predict",
        str(single.folder),
        "--data",
        "-",
        "--json",
        "--threads",
        "1",
    ]
    done = subprocess.run(
        arguments, input="good fun film\n\ndull boring plot\n", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert (
        done.stderr
        == "textlora: standard input line 2: column 'text': empty text; row skipped\ntextlora: 1 row skipped\n"
    )
    expected = answers(single, ["good fun film", "dull boring plot"])
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["label"] for row in found] == [label for label, _, _ in expected]


def test_standard_input_as_csv_and_json_lines(cli, single, tmp_path, monkeypatch):
    expected = [label for label, _, _ in answers(single)]
    for name, text in (
        ("csv", "text\n" + "\n".join(TEXTS) + "\n"),
        ("jsonl", "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)),
        ("txt", "\n".join(TEXTS) + "\n"),
    ):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        with open(path, "rb") as file, open(os.dup(file.fileno()), encoding="utf-8") as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            out, err = predict(cli, single, "-", "--json")
        assert err == ""
        assert [json.loads(line)["label"] for line in out.splitlines()] == expected, name


def test_several_labels(cli, multi, tmp_path):
    path = write_csv(tmp_path / "in.csv", [(text,) for text in TEXTS], ("text",))
    classifier = TextClassifier.load(multi.folder, base=multi.config.model)
    thresholds, names = classifier.meta.thresholds, classifier.meta.labels
    assert names == ("long", "praise", "warm")
    assert len(thresholds) == 3
    scores = 1 / (1 + np.exp(-classifier.logits(TEXTS).astype(np.float64) / classifier.meta.temperature))
    chosen = [
        [name for name, score, limit in zip(names, row, thresholds, strict=True) if score >= limit]
        for row in scores
    ]
    out, _ = predict(cli, multi, path)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert list(rows[0]) == ["text", "labels", "score", "score_long", "score_praise", "score_warm"]
    assert [row["labels"] for row in rows] == [",".join(row) for row in chosen]
    assert np.allclose([float(row["score"]) for row in rows], scores.max(1), atol=1e-6)
    out, _ = predict(cli, multi, path, "--json")
    found = [json.loads(line) for line in out.splitlines()]
    assert [row["labels"] for row in found] == chosen
    assert [list(row) for row in found] == [["labels", "score", "scores"]] * 11


def test_thresholds_and_temperature_are_obeyed(multi, single):
    classifier = TextClassifier.load(multi.folder, base=multi.config.model)
    plain = with_meta(classifier, temperature=1.0, thresholds=None)
    scores = np.array([list(p.scores.values()) for p in plain.predict(TEXTS)])
    assert [p.labels for p in plain.predict(TEXTS)] == [
        tuple(n for n, s in zip(plain.meta.labels, row, strict=True) if s >= 0.5) for row in scores
    ]
    limits = tuple(map(float, np.median(scores, axis=0)))
    picked = with_meta(classifier, temperature=1.0, thresholds=limits).predict(TEXTS)
    for k, name in enumerate(classifier.meta.labels):
        assert [name in p.labels for p in picked] == (scores[:, k] >= limits[k]).tolist()
        assert sum(name in p.labels for p in picked) == 6
    assert {p.labels for p in with_meta(classifier, thresholds=(1.0, 1.0, 1.0)).predict(TEXTS)} == {()}
    cool = TextClassifier.load(single.folder, base=single.config.model)
    warm = with_meta(cool, temperature=4.0)
    for a, b in zip(cool.predict(TEXTS), warm.predict(TEXTS), strict=True):
        assert (a.label, a.logits) == (b.label, b.logits)
        odds = np.log(b.scores["pos"] / b.scores["neg"])
        assert odds == pytest.approx((a.logits[1] - a.logits[0]) / 4, abs=1e-6)


def test_numbers(cli, regression, tmp_path):
    path = write_csv(tmp_path / "in.csv", [(text,) for text in TEXTS], ("text",))
    values = TextClassifier.load(regression.folder, base=regression.config.model).logits(TEXTS)[:, 0]
    out, _ = predict(cli, regression, path)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert list(rows[0]) == ["text", "value"]
    assert np.allclose([float(row["value"]) for row in rows], values, atol=1e-6)
    out, _ = predict(cli, regression, path, "--json", "--logits")
    for line, value in zip(out.splitlines(), values, strict=True):
        row = json.loads(line)
        assert list(row) == ["value", "logits"]
        assert row["value"] == pytest.approx(value, abs=1e-6)
        assert row["logits"] == [row["value"]]


def test_text_pairs(cli, pairs, tmp_path):
    others = TEXTS[::-1]
    path = write_csv(tmp_path / "in.csv", list(zip(TEXTS, others, strict=True)), ("premise", "hypothesis"))
    out, _ = predict(cli, pairs, path, "--json", "--logits")
    found = [json.loads(line) for line in out.splitlines()]
    for row, (label, _, logits) in zip(found, answers(pairs, TEXTS, others), strict=True):
        assert row["label"] == label
        assert np.allclose(row["logits"], logits, atol=1e-5)


def test_single_texts_for_a_pair_task_and_the_other_way_round(cli, pairs, single, tmp_path):
    alone = write_csv(tmp_path / "alone.csv", single_rows(3))
    both = write_csv(
        tmp_path / "both.csv", [("a film", "a plot", "pos")], ("sentence1", "sentence2", "label")
    )
    for command in ("predict", "evaluate"):
        assert cli.fails(command, pairs.folder, "--data", alone) == (
            "this adapter was trained on text pairs and got single texts; give the second texts (--text-pair-column)"
        )
        assert cli.fails(command, single.folder, "--data", both) == (
            "this adapter was trained on single texts and got pairs; name the one column of the text with --text-column"
        )
    out, _ = predict(cli, single, both, "--text-column", "sentence2", "--json")
    assert json.loads(out)["label"] == answers(single, ["a plot"])[0][0]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ("--text-column", "review"),
            "in.csv: no column 'review'; it has 'text', 'label'; name one of these",
        ),
        (
            ("--encoding", "latin-99"),
            "unknown encoding 'latin-99'; use a name such as utf-8, cp1252, cp949 or utf-16",
        ),
        (("--labels", "a,b"), "has its own labels; `textlora inspect --relabel old=new` renames them"),
        (("--device", "cuda:9"), "CUDA devices here; use --device cpu"),
        (("--model", "/nowhere"), "/nowhere: no such folder; give the folder of a base model, or a hub id"),
    ],
)
def test_mistakes_leave_no_output(cli, single, tmp_path, flags, said):
    path, output = write_csv(tmp_path / "in.csv", single_rows(3)), tmp_path / "out.csv"
    assert said in cli.fails("predict", single.folder, "--data", path, "--output", output, *flags)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.csv"]


def test_no_such_data(cli, single, tmp_path):
    assert cli.fails("predict", single.folder, "--data", tmp_path / "none.csv") == (
        f"no such file: {tmp_path / 'none.csv'}; give a file, or - for standard input"
    )


def test_an_output_that_is_there_is_kept_when_predicting_fails(cli, single, tmp_path):
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"text": "good film"}\n', encoding="utf-8")
    output.write_text("old\n", encoding="utf-8")
    cli.fails("predict", single.folder, "--data", path, "--output", output, "--model", "/nowhere")
    assert output.read_text(encoding="utf-8") == "old\n"


def test_predict_from_python_refuses_what_is_no_text(single):
    classifier = TextClassifier.load(single.folder, base=single.config.model)
    assert classifier.predict([]) == []
    for texts, said in (
        (["good", ""], "text 2: empty"),
        (["good", " \n"], "text 2: empty"),
        ([3], "text 1: not a string"),
    ):
        with pytest.raises(UsageError, match=said):
            classifier.predict(texts)
    with pytest.raises(UsageError, match="2 texts and 1 pairs"):
        classifier.predict(["a", "b"], ["c"])
