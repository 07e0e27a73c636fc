"""The server as its clients meet it: every protocol, keys and tenants, limits, faults on disk; answers equal
TextClassifier.predict."""

import asyncio
import contextlib
import errno
import io
import json
import marshal
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import numpy as np
import openai
import psutil
import pytest
import uvicorn
from fastapi.testclient import TestClient
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from hypothesis import HealthCheck, given, settings
from test_engine import KINDS, make_adapter

from textlora import AdapterEngine, TextClassifier
from textlora.cli import run
from textlora.core.errors import TextloraError, UsageError, error_of, kinds, told
from textlora.server.app import create_app
from textlora.server.folders import Folders
from textlora.server.ipc import Link
from textlora.server.keys import KeyRing, read_keys
from textlora.server.registry import Registry
from textlora.server.run import server_config
from textlora.server.service import Service
from textlora.server.settings import ServeSettings, read_settings
from textlora.server.worker import Worker

NAMES = {"single": 0, "many": 1, "multi": 2, "value": 3, "pair": 7}
TEXT = "a very good film"


@pytest.fixture(scope="session")
def shelf(tiny_base, tmp_path_factory) -> Path:
    """A folder of adapters: single-label, 77 labels, multi-label, regression, pairs."""
    root = tmp_path_factory.mktemp("shelf")
    for name, kind in NAMES.items():
        make_adapter(root / name, tiny_base("bert"), KINDS[kind], seed=kind)
    return root


@pytest.fixture
def start(tiny_base, shelf):
    """`start(keys, **settings)` gives a client of a server with all adapters of the shelf; `client.service`
    is what it runs.

    What computes is called in this process, through the same bytes as in another one.
    """
    opened, plain = [], lambda value: marshal.loads(marshal.dumps(value))

    def make(keys: KeyRing | None = None, run: bool = True, **changes) -> TestClient:
        given = {"model": str(tiny_base("bert")), "device": "cpu", "batch_wait_ms": 0.0}
        if "adapter_dir" not in changes:
            given["adapter"] = tuple(f"{name}={shelf / name}" for name in NAMES)
        settings = ServeSettings(**given | changes)
        worker = Worker(
            AdapterEngine(settings.model, device="cpu", resident_bytes=settings.adapter_memory_mb * 2**20)
        )
        service = Service(
            Registry(lambda call, given: plain(worker.handle(call, plain(given)))), worker.facts(), settings
        )
        folders = Folders(service)
        folders.open_all()
        client = TestClient(create_app(service, keys or KeyRing(), folders), raise_server_exceptions=False)
        client.service, client.folders, client.worker = service, folders, worker
        if run:
            opened.append(client)
            client.__enter__()
        return client

    yield make
    for client in opened:
        client.__exit__(None, None, None)


@pytest.fixture(scope="session")
def alone(tiny_base, shelf):
    """`alone(name, text, pair)`: what TextClassifier.predict gives."""
    loaded = {}

    def predict(name: str, text: str = TEXT, pair: str | None = None):
        if name not in loaded:
            loaded[name] = TextClassifier.load(shelf / name, base=str(tiny_base("bert")), device="cpu")
        return loaded[name].predict([text], None if pair is None else [pair])[0]

    return predict


def assert_scores(found: list[dict], want: dict[str, float]) -> None:
    assert [row["label"] for row in found] == sorted(want, key=lambda label: -want[label])
    np.testing.assert_allclose(
        [row["score"] for row in found], sorted(want.values(), reverse=True), rtol=1e-5, atol=1e-6
    )


def error(answer, status: int, kind: str) -> str:
    """The message of an error of the one shape."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error", "error_type"}
    assert body["error_type"] == kind
    return body["error"]


# --- text-embeddings-inference ---


def test_predict_has_the_shapes_of_tei(start, alone):
    client = start(default_adapter="single")
    post = lambda inputs, **more: client.post("/predict", json={"inputs": inputs} | more)
    assert_scores(post(TEXT).json(), alone("single").scores)
    assert_scores(post([TEXT]).json(), alone("single").scores)
    batch = post([[TEXT], ["dull"]]).json()
    assert_scores(batch[0], alone("single").scores)
    assert_scores(batch[1], alone("single", "dull").scores)
    assert_scores(post(["good", "bad"], model="pair").json(), alone("pair", "good", "bad").scores)
    assert_scores(post([["good", "bad"]], model="pair").json()[0], alone("pair", "good", "bad").scores)
    assert "single texts: two strings in a list are one pair" in error(
        post(["good", "bad"]), 400, "Validation"
    )
    assert "takes pairs" in error(post("good", model="pair"), 400, "Validation")
    raw = post(TEXT, raw_scores=True).json()
    assert_scores(raw, dict(zip(alone("single").scores, alone("single").logits, strict=True)))
    answer = post(TEXT)
    assert int(answer.headers["x-compute-tokens"]) == 6
    assert int(answer.headers["x-compute-characters"]) == len(TEXT)
    for inputs in ([], ["a", "b", "c"], [["a", "b", "c"]], [[]], 3, None, ["a", 3], [["a"], "b"]):
        error(post(inputs), 422, "Validation")
    assert error(post(" "), 400, "Empty") == "text 1 is empty"
    assert error(post([["good"], [""]]), 400, "Empty") == "text 2 is empty"


def test_every_kind_of_task(start, alone):
    client = start()
    multi = client.post("/predict", json={"inputs": TEXT, "model": "multi"}).json()
    assert_scores(multi, alone("multi").scores)
    assert {row["label"] for row in multi if row["chosen"]} == set(alone("multi").labels)
    value = client.post("/adapters/value/predict", json={"inputs": TEXT}).json()
    assert_scores(value, {"value": alone("value").score})
    assert (
        len(
            client.post(
                "/predict", json={"inputs": TEXT, "parameters": {"adapter_id": "many", "top_k": 3}}
            ).json()
        )
        == 3
    )
    logits = np.array(alone("multi").logits)
    softmax = client.post(
        "/predict", json={"inputs": TEXT, "model": "multi", "parameters": {"function_to_apply": "softmax"}}
    ).json()
    np.testing.assert_allclose(
        sorted(row["score"] for row in softmax), sorted(np.exp(logits) / np.exp(logits).sum()), rtol=1e-5
    )
    none = client.post(
        "/predict", json={"inputs": TEXT, "model": "multi", "parameters": {"function_to_apply": "none"}}
    ).json()
    np.testing.assert_allclose([row["score"] for row in none], sorted(logits, reverse=True), rtol=1e-5)


def test_several_adapters_on_one_text(start, alone):
    client = start()
    names = ["many", "multi", "value"]
    found = client.post("/predict", json={"inputs": TEXT, "model": names}).json()
    assert list(found) == names
    for name in names:
        assert_scores(found[name], alone(name).scores)
    batch = client.post(
        "/predict", json={"inputs": [[TEXT], ["dull"]], "parameters": {"adapter_id": ["single"]}}
    ).json()
    assert_scores(batch[1]["single"], alone("single", "dull").scores)
    answer = client.post("/v1/classify", json={"input": [TEXT, "dull"], "model": names}).json()
    assert [(row["index"], row["model"]) for row in answer["data"]] == [
        (i, name) for i in range(2) for name in names
    ]


def test_which_adapter(start):
    client = start()
    message = error(client.post("/predict", json={"inputs": TEXT}), 400, "Validation")
    assert message == "name an adapter as model; there are: many, multi, pair, single, value"
    assert (
        error(client.post("/predict", json={"inputs": TEXT, "model": "other"}), 404, "NotFound")
        == "no adapter 'other'"
    )
    for name in ("../up", "\u00fc", "x" * 500, ""):
        assert (
            error(client.post("/predict", json={"inputs": TEXT, "model": name}), 404, "NotFound")
            == "no adapter of that name"
        )
    error(client.post("/adapters/single/predict", json={"inputs": TEXT, "model": "many"}), 400, "Validation")
    error(client.post("/predict", json={"inputs": TEXT, "model": ["many", "many"]}), 400, "Validation")
    error(client.post("/adapters/..%2Fsecret/predict", json={"inputs": TEXT}), 404, "NotFound")
    assert (
        client.post("/adapters/single/predict", json={"inputs": TEXT, "model": "single"}).status_code == 200
    )


def test_a_text_longer_than_the_adapter_reads(start, alone):
    client = start()
    text = "good " * 100
    assert_scores(
        client.post("/predict", json={"inputs": text, "model": "single"}).json(), alone("single", text).scores
    )
    message = error(
        client.post("/predict", json={"inputs": text, "model": "single", "truncate": False}), 422, "Tokenizer"
    )
    assert message == "text 1 has 102 tokens; adapter 'single' reads 40"


# --- vLLM, SGLang, OpenAI ---


def test_classify_has_the_shape_of_vllm(start, alone):
    client = start(default_adapter="single")
    for path in ("/classify", "/v1/classify"):
        answer = client.post(
            path, json={"model": "single", "input": [TEXT, "dull"], "user": "u", "priority": 0}
        ).json()
        assert answer["object"] == "list"
        assert answer["id"].startswith("classify-")
        assert answer["model"] == "single"
        assert answer["usage"] == {
            "prompt_tokens": 9,
            "total_tokens": 9,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
        }
        for row, text in zip(answer["data"], (TEXT, "dull"), strict=True):
            want = alone("single", text)
            assert (row["label"], row["num_classes"]) == (want.label, 2)
            np.testing.assert_allclose(row["probs"], list(want.scores.values()), rtol=1e-5)
    raw = client.post("/classify", json={"input": TEXT, "use_activation": False}).json()
    np.testing.assert_allclose(raw["data"][0]["probs"], alone("single").logits, rtol=1e-5)
    multi = client.post("/classify", json={"input": TEXT, "model": "multi"}).json()["data"][0]
    assert multi["labels"] == list(alone("multi").labels)
    for wrong in ([101, 102], [], {"a": 1}):
        error(client.post("/classify", json={"input": wrong}), 422, "Validation")
    assert "takes pairs" in error(
        client.post("/classify", json={"input": TEXT, "model": "pair"}), 400, "Validation"
    )


def test_models_are_listed_by_name(start, shelf):
    client = start()
    answer = client.get("/v1/models")
    assert str(shelf.parent) not in answer.text
    cards = {card["id"]: card for card in answer.json()["data"]}
    assert list(cards) == sorted(NAMES)
    assert cards["many"] | {"created": 0} == {
        "id": "many", "object": "model", "created": 0, "owned_by": "textlora", "root": "many", "parent": "bert",
        "problem_type": "single_label_classification", "pairs": False, "num_labels": 77,
    }  # fmt: skip
    assert client.get("/v1/models/multi").json()["labels"] == [f"label {k}" for k in range(5)]
    error(client.get("/v1/models/other"), 404, "NotFound")


def test_health_info_metrics(start):
    client = start(default_adapter="single")
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    info = client.get("/info").json()
    assert info["executor"].startswith(("kernels (", "torch ("))
    assert info["model_id"] == "bert"
    assert info["model_type"]["classifier"]["id2label"] == {"0": "label 0", "1": "label 1"}
    for name in NAMES:
        client.post("/classify", json={"input": TEXT, "model": name})
    page = client.get("/metrics").text
    assert 'textlora_requests_total{route="/classify",status="200"} 4.0' in page
    assert 'textlora_requests_total{route="/classify",status="400"} 1.0' in page
    assert "textlora_texts_total 4.0" in page
    assert "textlora_adapters_registered 5.0" in page
    assert not any(f'"{name}"' in page for name in NAMES)


# --- keys and tenants ---


@pytest.fixture
def keys(tmp_path) -> KeyRing:
    path = tmp_path / "keys.toml"
    path.write_text(
        '[boss]\nkey = "boss-key-1"\nmanage = true\n[small]\nkey = "small-key-1"\nadapters = ["s*", "value"]\n'
    )
    return read_keys(str(path))


def bearer(token: str) -> dict[str, dict[str, str]]:
    return {"headers": {"Authorization": f"Bearer {token}"}}


def test_a_key_is_needed(start, keys):
    client = start(keys)
    for sent in (
        {},
        bearer("wrong-key-1"),
        bearer(""),
        {"headers": {"Authorization": "Basic Ym9zcw=="}},
        bearer("boss-key-1x"),
    ):
        for path in ("/v1/models", "/info", "/metrics"):
            answer = client.get(path, **sent)
            error(answer, 401, "Unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
        error(client.post("/predict", json={"inputs": TEXT, "model": "single"}, **sent), 401, "Unauthorized")
        error(
            client.post("/predict", content=b"x" * 100_000_000, **sent), 401, "Unauthorized"
        )  # before the body is read
    assert (
        client.post("/predict", json={"inputs": TEXT, "model": "single"}, **bearer("boss-key-1")).status_code
        == 200
    )
    assert (
        client.get("/health").status_code
        == client.get("/ready").status_code
        == client.get("/").status_code
        == 200
    )


def test_adapters_of_others_do_not_exist(start, keys):
    client = start(keys, default_adapter="many")
    small = bearer("small-key-1")
    assert [card["id"] for card in client.get("/v1/models", **small).json()["data"]] == ["single", "value"]
    info = client.get("/info", **small).json()
    assert (info["adapters"], info["default_adapter"], info["model_type"]["classifier"]["id2label"]) == (
        2,
        None,
        {},
    )
    error(client.get("/metrics", **small), 403, "Forbidden")
    there = [
        client.post("/predict", json={"inputs": TEXT, "model": "multi"}, **small),
        client.get("/v1/models/multi", **small),
    ]
    missing = [
        client.post("/predict", json={"inputs": TEXT, "model": "nulti"}, **small),
        client.get("/v1/models/nulti", **small),
    ]
    for a, b in zip(there, missing, strict=True):
        assert error(a, 404, "NotFound").replace("multi", "nulti") == error(b, 404, "NotFound")
    assert (
        error(
            client.post("/predict", json={"inputs": TEXT, "model": ["single", "multi"]}, **small),
            404,
            "NotFound",
        )
        == "no adapter 'multi'"
    )
    message = error(client.post("/predict", json={"inputs": TEXT}, **small), 400, "Validation")
    assert message == "name an adapter as model; there are: single, value"
    assert client.post("/predict", json={"inputs": TEXT, "model": "single"}, **small).status_code == 200


def test_key_files_with_mistakes(tmp_path):
    path = tmp_path / "keys.toml"
    for text, message in (
        ("", "holds no key"),
        ("[a]\nkey = 'short'", "needs a key of at least 8 characters"),
        ("[a]\nkey = 'long-enough'\nadapters = 'x'", "should be a list of name patterns"),
        ("[a]\nkey = 'long-enough'\nadapter = ['x']", "nothing else"),
        ("[a]\nkey = 'long-enough'\n[b]\nkey = 'long-enough'", "two clients have the same key"),
        ("[a]\nkey = 'long-enough'\nmanage = 1", "manage should be true or false"),
        ("key = long-enough", "not a TOML file"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=message) as raised:
            read_keys(str(path))
        assert "long-enough" not in str(raised.value)
    with pytest.raises(UsageError, match="No such file"):
        read_keys(str(tmp_path / "none.toml"))
    assert read_keys(None, "the-only-key").find("the-only-key").manage
    assert read_keys(None).find(None).sees_all


# --- limits ---


def test_limits(start):
    client = start(max_client_batch_size=4, max_text_chars=1000, max_body_bytes=5000)
    post = lambda inputs, **more: client.post("/predict", json={"inputs": inputs, "model": "single"} | more)
    assert post([["good"]] * 4).status_code == 200
    assert (
        error(post([["good"]] * 5), 413, "Validation")
        == "5 texts for 1 adapters; at most 4 rows in one request"
    )
    error(post([["good"]] * 2, model=["single", "many", "multi"]), 413, "Validation")
    assert error(post("x" * 1001), 413, "Validation") == "text 1 has 1001 characters; at most 1000"
    assert error(post("x" * 5001), 413, "Validation") == "the body has more than 5000 bytes"

    def stream():
        for _ in range(1000):
            yield b" " * 100

    error(
        client.post("/predict", content=stream(), headers={"Content-Type": "application/json"}),
        413,
        "Validation",
    )
    assert client.get("/health").status_code == 200


def test_a_body_of_100_mb_and_a_text_of_a_million_characters(start):
    client = start()
    error(client.post("/predict", content=b"x" * 100_000_000), 413, "Validation")
    error(client.post("/predict", json={"inputs": "word " * 200_000, "model": "single"}), 413, "Validation")
    long = start(max_text_chars=2_000_000)
    assert long.post("/predict", json={"inputs": "word " * 200_000, "model": "single"}).status_code == 200


def test_bodies_that_are_no_request(start):
    client = start(default_adapter="single")
    json_type = {"Content-Type": "application/json"}
    for content, status in (
        (b'{"inputs": "\xff\xfe"}', 400),
        (b"\x00\x01", 422),
        (b"", 422),
        (b"[]", 422),
        (b"null", 422),
        (b"{", 422),
        (b'{"inputs": "\\ud800"}', 422),
        (b'{"inputs": "a", "model": "\\ud800"}', 422),
        (b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        (b'{"inputs": "a", "raw_scores": "yes"}', 422),
        (b'{"inputs": "a", "parameters": {"function_to_apply": "relu"}}', 422),
    ):
        message = error(client.post("/predict", content=content, headers=json_type), status, "Validation")
        assert "Traceback" not in message
    for kind in ("text/plain", "application/jsonp", "application/x-www-form-urlencoded", ""):
        said = error(
            client.post("/predict", content=b'{"inputs": "a"}', headers={"Content-Type": kind}),
            422,
            "Validation",
        )
        assert said == "the Content-Type is not application/json"
    for kind in ("application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"):
        assert (
            client.post("/predict", content=b'{"inputs": "a"}', headers={"Content-Type": kind}).status_code
            == 200
        )
    assert (
        client.post(
            "/predict", content='{"inputs": "naïve 🎬 \\u0000 text"}'.encode(), headers=json_type
        ).status_code
        == 200
    )
    error(client.get("/predict"), 405, "Validation")
    error(client.get("/nothing/here"), 404, "NotFound")


def test_cors_is_off_unless_named(start):
    origin = {"Origin": "https://a.example"}
    assert "access-control-allow-origin" not in start().get("/health", headers=origin).headers
    client = start(cors_origins=("https://a.example",))
    assert client.get("/health", headers=origin).headers["access-control-allow-origin"] == "https://a.example"
    assert (
        "access-control-allow-origin"
        not in client.get("/health", headers={"Origin": "https://b.example"}).headers
    )


def test_logs_are_json_without_texts_or_keys(start, keys, capfd):
    client = start(keys)
    given = bearer("boss-key-1")
    given["headers"]["x-request-id"] = "abc-1"
    answer = client.post("/predict", json={"inputs": "a secret sentence", "model": "single"}, **given)
    assert answer.headers["x-request-id"] == "abc-1"
    client.post(
        "/predict",
        json={"inputs": "a secret sentence", "model": "secret"},
        headers={"Authorization": "Bearer secret-key", "x-request-id": "a b"},
    )
    said = capfd.readouterr().err
    lines = [json.loads(line) for line in said.splitlines()]
    first = next(line for line in lines if line.get("request_id") == "abc-1")
    assert {key: first[key] for key in ("event", "route", "status", "texts", "tokens", "client")} == {
        "event": "request", "route": "/predict", "status": 200, "texts": 1, "tokens": first["tokens"], "client": "boss",
    }  # fmt: skip
    assert "secret" not in said
    assert "boss-key-1" not in said
    assert "a b" not in said


def test_a_full_disk_under_the_log_stops_no_answer(start, monkeypatch):
    client = start(default_adapter="single")

    class Full(io.StringIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    assert client.post("/predict", json={"inputs": TEXT}).status_code == 200
    error(client.get("/nothing"), 404, "NotFound")


def test_a_bug_shows_nothing_of_the_inside(start, monkeypatch, capfd):
    client = start(default_adapter="single")

    def broken(*_):
        raise ZeroDivisionError("of the secret text")

    monkeypatch.setattr(client.service.batcher, "_run", broken)
    assert error(client.post("/predict", json={"inputs": TEXT}), 500, "Backend") == "internal error"
    monkeypatch.setattr(client.service, "select", broken)
    message = error(client.post("/predict", json={"inputs": TEXT}), 500, "Backend")
    assert message == "internal error; the log has its place under the request id"
    said = capfd.readouterr().err
    assert "secret" not in said
    assert '"error": "ZeroDivisionError"' in said


# --- a full queue, a deadline, a client that goes ---


@pytest.fixture
def held(monkeypatch):
    """`held(client)` makes batches wait; `.set()` on what it gives lets them go, `.begun` says that one has
    started."""
    gates = []

    def hold(client: TestClient) -> threading.Event:
        gate, begun, run = threading.Event(), threading.Event(), client.service.batcher._run

        def slow(*given):
            begun.set()
            gate.wait(20)
            return run(*given)

        monkeypatch.setattr(client.service.batcher, "_run", slow)
        gate.begun = begun
        gates.append(gate)
        return gate

    yield hold
    for gate in gates:
        gate.set()


def test_a_full_queue_says_429_and_when_to_come_again(start, held):
    client = start(default_adapter="single", queue_rows=3)
    client.post("/predict", json={"inputs": TEXT})
    gate = held(client)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(client.post, "/predict", json={"inputs": TEXT})
        assert gate.begun.wait(10)
        waiting = [pool.submit(client.post, "/predict", json={"inputs": TEXT}) for _ in range(3)]
        while client.service.batcher.waiting < 3:
            time.sleep(0.002)
        refused = client.post("/predict", json={"inputs": TEXT})
        error(refused, 429, "Overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert client.get("/health").status_code == 200
        gate.set()
        assert [one.result().status_code for one in [first, *waiting]] == [200] * 4
    assert 'textlora_dropped_requests_total{reason="queue_full"} 1.0' in client.get("/metrics").text


def test_late_answers_are_504_and_their_work_is_dropped(start, held):
    client = start(default_adapter="single", deadline_seconds=0.3)
    client.post("/predict", json={"inputs": TEXT})
    gate = held(client)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.post, "/predict", json={"inputs": TEXT})
        assert gate.begun.wait(10)
        error(client.post("/predict", json={"inputs": "never run"}), 504, "Timeout")
        error(first.result(), 504, "Timeout")
    assert client.service.batcher.waiting == 0
    gate.set()
    assert client.post("/predict", json={"inputs": TEXT}).status_code == 200
    assert "textlora_texts_total 2.0" in client.get("/metrics").text


def test_a_bad_row_fails_only_its_own_request(start, held, shelf, tmp_path, tiny_base):
    """Two adapters in one batch, one of which goes between the check and the batch."""
    client = start()
    for name in ("single", "many"):
        client.post("/predict", json={"inputs": TEXT, "model": name})
    gate = held(client)
    with ThreadPoolExecutor(4) as pool:
        pool.submit(client.post, "/predict", json={"inputs": TEXT, "model": "single"})
        assert gate.begun.wait(10)
        good, gone = (
            pool.submit(client.post, "/predict", json={"inputs": TEXT, "model": name})
            for name in ("single", "many")
        )
        while client.service.batcher.waiting < 2:
            time.sleep(0.002)
        client.service.bank.remove("many", 0)
        gate.set()
        assert good.result().status_code == 200
        assert error(gone.result(), 404, "NotFound") == "no adapter 'many'"


# --- adapters that come and go ---


def loading(tmp_path, shelf, *names: str) -> Path:
    root = tmp_path / "allowed"
    root.mkdir(exist_ok=True)
    for name in names:
        shutil.copytree(shelf / name, root / name)
    return root


def test_load_and_unload_as_vllm(start, shelf, tmp_path, alone):
    root = loading(tmp_path, shelf, "many", "single")
    client = start(adapter_dir=None, adapter=(), load_from=(str(root),))
    load = lambda name, path, **more: client.post(
        "/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path} | more
    )
    answer = load("one", str(root / "many"))
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'one' added successfully.")
    assert_scores(client.post("/predict", json={"inputs": TEXT, "model": "one"}).json(), alone("many").scores)
    assert error(load("one", "single"), 400, "Validation") == "adapter name 'one' is taken; remove it first"
    assert load("one", "single", load_inplace=True).status_code == 200
    assert_scores(
        client.post("/predict", json={"inputs": TEXT, "model": "one"}).json(), alone("single").scores
    )
    gone = client.post("/v1/unload_lora_adapter", json={"lora_name": "one"})
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'one' removed successfully.")
    error(client.post("/v1/unload_lora_adapter", json={"lora_name": "one"}), 404, "NotFound")
    assert client.get("/v1/models").json()["data"] == []
    assert client.service.bank.state() == {"registered": 0, "resident": 0, "resident_bytes": 0}


def test_loading_is_off_unless_asked_for(start, shelf):
    client = start()
    error(
        client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": str(shelf / "many")}),
        404,
        "NotFound",
    )
    assert "/v1/load_lora_adapter" not in client.get("/openapi.json").json()["paths"]


def test_nothing_outside_the_allowed_folders_is_loaded(start, shelf, tmp_path):
    root = loading(tmp_path, shelf, "many")
    (root / "link").symlink_to(shelf / "single")
    (root / "loop").symlink_to(root / "loop")
    shutil.copytree(shelf / "single", root / "inner")
    (root / "inner" / "adapter_model.safetensors").unlink()
    (root / "inner" / "adapter_model.safetensors").symlink_to(shelf / "single" / "adapter_model.safetensors")
    (root / "broken").mkdir()
    client = start(adapter=(), load_from=(str(root),))
    tries = (
        str(shelf / "single"),
        "../shelf/single",
        "link",
        "loop",
        "inner",
        "many/../../x",
        "/",
        ".",
        "",
        "many\x00",
        "~",
        "x" * 5000,
        "/etc/passwd",
    )
    messages = {
        error(
            client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path}), 404, "NotFound"
        )
        for path in tries
    }
    assert len(messages) == 1
    broken = error(
        client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "broken"}),
        400,
        "Validation",
    )
    assert str(root) not in broken
    for name in ("../x", "a/b", "", "ü"):
        error(
            client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": "many"}),
            400,
            "Validation",
        )
    assert client.get("/v1/models").json()["data"] == []


def test_only_managers_load_and_only_names_of_theirs(start, shelf, tmp_path):
    root = loading(tmp_path, shelf, "many")
    path = tmp_path / "keys.toml"
    path.write_text(
        '[user]\nkey = "user-key-1"\n[lead]\nkey = "lead-key-1"\nadapters = ["lead-*"]\nmanage = true\n'
    )
    client = start(read_keys(str(path)), load_from=(str(root),))
    body = {"lora_name": "lead-1", "lora_path": "many"}
    error(client.post("/v1/load_lora_adapter", json=body), 401, "Unauthorized")
    error(client.post("/v1/load_lora_adapter", json=body, **bearer("user-key-1")), 403, "Forbidden")
    error(
        client.post("/v1/load_lora_adapter", json=body | {"lora_name": "other"}, **bearer("lead-key-1")),
        403,
        "Forbidden",
    )
    error(
        client.post("/v1/unload_lora_adapter", json={"lora_name": "single"}, **bearer("lead-key-1")),
        404,
        "NotFound",
    )
    assert client.post("/v1/load_lora_adapter", json=body, **bearer("lead-key-1")).status_code == 200
    assert client.get("/info", **bearer("lead-key-1")).json()["can_load"]
    assert not client.get("/info", **bearer("user-key-1")).json()["can_load"]


def test_a_watched_folder(start, shelf, tmp_path, alone):
    watched = tmp_path / "watched"
    watched.mkdir()
    shutil.copytree(shelf / "many", watched / "one")
    (watched / "notes").mkdir()
    (watched / "outside").symlink_to(shelf / "multi")
    client = start(adapter_dir=str(watched), poll_seconds=1000)
    ask = lambda name: client.post("/predict", json={"inputs": TEXT, "model": name})
    assert_scores(ask("one").json(), alone("many").scores)
    error(ask("outside"), 404, "NotFound")
    # half-copied: known by its side file, refused until it is whole
    (watched / "two").mkdir()
    shutil.copy(shelf / "single" / "textlora.json", watched / "two")
    client.folders.look()
    assert (
        error(ask("two"), 424, "Backend")
        == "adapter 'two' cannot be used: its folder is damaged, incomplete or gone"
    )
    for file in (shelf / "single").iterdir():
        shutil.copy(file, watched / "two")
    client.folders.look()
    assert_scores(ask("two").json(), alone("single").scores)
    # replaced by a damaged one: the old one goes on; by a whole one: taken up
    data = (shelf / "multi" / "adapter_model.safetensors").read_bytes()
    (watched / "one" / "adapter_model.safetensors").write_bytes(data[: len(data) // 2])
    client.folders.look()
    assert_scores(ask("one").json(), alone("many").scores)
    for file in (shelf / "multi").iterdir():
        shutil.copy(file, watched / "one")
    client.folders.look()
    assert_scores(ask("one").json(), alone("multi").scores)
    # deleted
    shutil.rmtree(watched / "one")
    client.folders.look()
    error(ask("one"), 404, "NotFound")
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["two"]


def test_a_folder_that_breaks_while_it_is_served(start, shelf, tmp_path, alone):
    root = loading(tmp_path, shelf, "many", "single")
    client = start(adapter=(f"many={root / 'many'}", f"single={root / 'single'}"), adapter_memory_mb=1)
    client.worker.bank.resident_bytes = 0  # nothing stays in memory
    ask = lambda name: client.post("/predict", json={"inputs": TEXT, "model": name})
    assert_scores(ask("many").json(), alone("many").scores)
    weights = root / "many" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    message = error(ask("many"), 424, "Backend")
    assert str(root) not in message
    assert_scores(ask("single").json(), alone("single").scores)
    data[-5] ^= 1
    weights.write_bytes(data)
    assert_scores(ask("many").json(), alone("many").scores)
    shutil.rmtree(root / "many")
    error(ask("many"), 424, "Backend")
    assert client.get("/health").status_code == 200


# --- settings ---


def test_settings_by_flag_environment_and_file(tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text('port = 1\nhost = "a"\nmax-text-chars = 5\nadapter = ["x=y"]\n')
    settings = read_settings(
        {"port": 3, "adapter": ()},
        str(file),
        {"TEXTLORA_PORT": "2", "TEXTLORA_HOST": "b", "TEXTLORA_LOAD_FROM": "p, q"},
    )
    assert (settings.port, settings.host, settings.max_text_chars, settings.load_from) == (
        3,
        "b",
        5,
        ("p", "q"),
    )
    assert settings.named_adapters() == {"x": Path("y")}
    with pytest.raises(UsageError, match=r"^TEXTLORA_PORT=x: not a whole number$"):
        read_settings({}, None, {"TEXTLORA_PORT": "x"})
    with pytest.raises(UsageError, match=r"^--queue-rows 0: must be at least 1$"):
        read_settings({"queue_rows": 0}, None, {})
    with pytest.raises(UsageError, match="not NAME=PATH"):
        ServeSettings(adapter=("x",)).named_adapters()
    with pytest.raises(UsageError, match="the name stands twice"):
        ServeSettings(adapter=("x=a", "x=b")).named_adapters()
    file.write_text("porte = 1\n")
    with pytest.raises(UsageError, match=r"unknown setting 'porte'; `textlora serve --help`"):
        read_settings({}, str(file), {})


def test_a_default_that_is_not_there(start):
    with pytest.raises(UsageError, match="--default-adapter other: no such adapter"):
        start(default_adapter="other")
    with pytest.raises(UsageError, match="no such folder"):
        start(load_from=("does-not-exist",))


# --- real sockets ---


@pytest.fixture
def listen(start):
    """`listen(...)` as `start`, on a real socket; gives (URL, service)."""
    running = []

    def make(*given, **changes):
        client = start(*given, run=False, **changes)
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(server_config(client.app, client.service.settings))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        running.append((server, thread, listener))
        while not server.started:
            time.sleep(0.005)
        return f"http://127.0.0.1:{listener.getsockname()[1]}", client

    yield make
    for server, thread, listener in running:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()


def test_an_openai_client_lists_models(listen, keys):
    url, _ = listen(keys, default_adapter="single")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="boss-key-1", max_retries=0) as client:
        assert sorted(model.id for model in client.models.list()) == sorted(NAMES)
        assert client.models.retrieve("many").id == "many"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("nobody")
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong-key-1", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_the_inference_client_works_unchanged(listen, alone, keys, monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", False
    )  # offline mode refuses even loopback
    url, _ = listen(keys, default_adapter="single")
    expect = lambda name, found: assert_scores(
        [{"label": row.label, "score": row.score} for row in found], alone(name).scores
    )
    client = InferenceClient(model=url, token="boss-key-1")
    expect("single", client.text_classification(TEXT))
    many = InferenceClient(model=f"{url}/adapters/many", token="boss-key-1")
    expect("many", many.text_classification(TEXT))
    assert len(many.text_classification(TEXT, top_k=2)) == 2
    raw = client.text_classification(TEXT, function_to_apply="none")
    np.testing.assert_allclose(sorted(row.score for row in raw), sorted(alone("single").logits), rtol=1e-5)

    async def several():
        async with AsyncInferenceClient(model=f"{url}/adapters/multi", token="boss-key-1") as client:
            return await asyncio.gather(*(client.text_classification(TEXT) for _ in range(20)))

    for found in asyncio.run(several()):
        expect("multi", found)
    with pytest.raises(HfHubHTTPError, match="401"):
        InferenceClient(model=url, token="wrong-key-1").text_classification(TEXT)


def test_many_clients_get_their_own_answers(listen, alone):
    url, client = listen(batch_wait_ms=5.0)
    texts = ["good", "bad", "a dull story", "very very good", "slow", TEXT]
    asked = [(name, text) for text in texts for name in ("single", "many", "multi", "value")] * 3
    with httpx2.Client(base_url=url) as http, ThreadPoolExecutor(16) as pool:
        found = list(
            pool.map(
                lambda one: http.post(f"/adapters/{one[0]}/predict", json={"inputs": one[1]}).json(), asked
            )
        )
    for (name, text), scores in zip(asked, found, strict=True):
        assert_scores(scores, alone(name, text).scores)
    page = client.service.metrics.page().decode()
    batches = float(re.search(r"^textlora_batch_rows_count (\S+)", page, re.MULTILINE).group(1))
    assert batches < len(asked)


def _raw(url: str, content: bytes) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.sendall(content)
    return connection


def _post_bytes(body: bytes) -> bytes:
    return (
        b"POST /adapters/single/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
        % (len(body), body)
    )


def test_work_of_a_client_that_went_is_dropped(listen, held):
    url, client = listen()
    httpx2.post(f"{url}/adapters/single/predict", json={"inputs": TEXT})
    gate = held(client)
    first = _raw(url, _post_bytes(b'{"inputs": "good"}'))
    assert gate.begun.wait(10)
    second = _raw(url, _post_bytes(b'{"inputs": "bad"}'))
    wait_for(lambda: client.service.batcher.waiting == 1)
    second.close()
    wait_for(lambda: client.service.batcher.waiting == 0)
    gate.set()
    assert first.recv(100).startswith(b"HTTP/1.1 200")
    first.close()
    assert (
        'textlora_dropped_requests_total{reason="client_gone"} 1.0' in client.service.metrics.page().decode()
    )


def test_a_client_that_stops_reading_or_sending_holds_up_nobody(listen):
    url, _ = listen(deadline_seconds=0.5)
    silent = _raw(url, _post_bytes(b'{"inputs": "good"}') * 200)  # asks, and never reads
    half = _raw(url, b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
    assert httpx2.post(f"{url}/adapters/single/predict", json={"inputs": TEXT}).status_code == 200
    assert half.recv(1000).startswith(b"HTTP/1.1 408")
    half.close()
    silent.close()


def test_headers_have_a_limit(listen):
    url, _ = listen(max_header_bytes=4096)
    start = b"GET /health HTTP/1.1\r\nHost: x\r\n"
    chunked = b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"
    for parts in (
        [start + b"X-Long: " + b"a" * 10000],
        [start + b"X-Long: ", *[b"a" * 500] * 20],
        [start, *[b"X: " + b"a" * 40 + b"\r\n"] * 200],
        [start + (b"X: " + b"a" * 40 + b"\r\n") * 200 + b"\r\n"],
        [b"GET /" + b"a" * 10000 + b" HTTP/1.1\r\n"],
        [b"GET /", *[b"a" * 500] * 20],
        [chunked + b"0\r\nX-Trailer: ", *[b"a" * 500] * 20],
        [chunked, *[b"0\r\n", *[b"X: " + b"a" * 40 + b"\r\n"] * 200]],
        [chunked + b"1;", *[b"a" * 500] * 20],
    ):
        connection = _raw(url, parts[0])
        with contextlib.suppress(ConnectionError):  # it closes before it has heard all
            for part in parts[1:]:
                time.sleep(0.0005)
                connection.sendall(part)
        with contextlib.suppress(ConnectionError):
            assert connection.recv(1000).startswith(b"HTTP/1.1 400"), parts
            assert connection.recv(1000) == b""
        connection.close()
    assert httpx2.get(f"{url}/health", headers={"X-Long": "a" * 3500}).status_code == 200
    many = _raw(url, (start + b"X: " + b"a" * 3000 + b"\r\n\r\n") * 50)  # each within it
    answered = b""
    while answered.count(b"HTTP/1.1 200") < 50:
        part = many.recv(100_000)
        assert part, answered
        answered += part
    many.close()


def wait_for(condition, *threads, seconds: float = 60) -> None:
    """Wait until `condition()`; raises what a future of `threads` raised meanwhile."""
    until = time.monotonic() + seconds
    while not condition():
        for thread in threads:
            if thread.done():
                thread.result()
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.fixture
def command(tiny_base, shelf, tmp_path):
    """`command(*flags)` runs `textlora serve` and gives (process, URL); its log is the file `process.log`.

    Not a pipe: nobody reads it while requests run, and a full one stops the server.
    """
    processes = []

    def run(*flags: str):
        given = [
            "--model",
            str(tiny_base("bert")),
            "--adapter-dir",
            str(shelf),
            "--port",
            "0",
            "--device",
            "cpu",
            "--threads",
            "1",
            *flags,
        ]
        log = tmp_path / f"server-{len(processes)}.log"
        with open(log, "w") as stream:
            process = subprocess.Popen(
                [sys.executable, "-c", "from textlora.cli import main; main()", "serve", *given],
                stderr=stream,
                cwd=shelf,
            )
        process.log = log
        processes.append(process)
        begun = lambda: [
            line
            for line in log.read_text().splitlines(keepends=True)
            if '"listening"' in line and line.endswith("\n")
        ]
        wait_for(lambda: begun() or process.poll() is not None)
        assert begun(), log.read_text()
        return process, json.loads(begun()[0])["url"]

    yield run
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("sign", "ends"),
    [
        (signal.SIGTERM, {0: '"stopped"'}),
        (
            signal.SIGINT,
            {130: "textlora: interrupted", 0: '"stopped"'},
        ),  # 0 where the tests are a job in the background, which ignores it
    ],
)
def test_a_signal_lets_running_requests_end(command, alone, sign, ends):
    process, url = command("--batch-wait-ms", "1500")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(httpx2.post, f"{url}/adapters/many/predict", json={"inputs": TEXT}, timeout=20)
        time.sleep(0.5)  # it waits for company, 1.5 s
        os.kill(computing(process), sign)  # a terminal, or a supervisor, tells every process
        process.send_signal(sign)
        assert_scores(waiting.result().json(), alone("many").scores)
    assert ends[process.wait(20)] in process.log.read_text()
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{url}/health")


def computing(process: subprocess.Popen) -> int:
    """The process that computes for a server."""
    (found,) = psutil.Process(process.pid).children()
    return found.pid


def test_what_computes_ends_with_its_server(command):
    process, _ = command()
    child = psutil.Process(computing(process))
    process.kill()
    process.wait()
    child.wait(20)


def test_when_what_computes_is_killed_another_is_started(command, shelf, tmp_path, alone):
    root = loading(tmp_path, shelf, "many", "value")
    process, url = command("--load-from", str(root))
    load = lambda name, path: httpx2.post(
        f"{url}/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path}
    )
    assert load("loaded", "many").status_code == load("lost", "value").status_code == 200
    shutil.rmtree(root / "value")
    stop, asked = threading.Event(), []

    def ask() -> None:
        with httpx2.Client(base_url=url, timeout=40) as http:
            while not stop.is_set():
                asked.append(http.post("/adapters/loaded/predict", json={"inputs": TEXT}))
                time.sleep(0.01)

    with ThreadPoolExecutor(2) as pool:
        clients = [pool.submit(ask) for _ in range(2)]
        wait_for(lambda: len(asked) > 20, *clients)
        os.kill(computing(process), signal.SIGKILL)
        wait_for(lambda: httpx2.get(f"{url}/ready").status_code == 503)
        error(httpx2.get(f"{url}/health"), 503, "Unhealthy")
        error(load("more", "many"), 503, "Unhealthy")
        wait_for(lambda: httpx2.get(f"{url}/ready").status_code == 200)
        before = len(asked)
        wait_for(lambda: len(asked) > before + 20, *clients)
        stop.set()
        for client in clients:
            client.result()
    refused = [answer for answer in asked if answer.status_code != 200]
    assert refused
    assert {error(answer, 503, "Unhealthy") for answer in refused} == {
        "the process that computes has ended; another is being started; come again later"
    }
    for answer in asked:
        if answer.status_code == 200:
            assert_scores(answer.json(), alone("many").scores)
    assert asked[-1].status_code == 200
    assert [card["id"] for card in httpx2.get(f"{url}/v1/models").json()["data"]] == sorted(
        [*NAMES, "loaded"]
    )
    error(httpx2.post(f"{url}/adapters/lost/predict", json={"inputs": TEXT}), 404, "NotFound")
    assert load("more", "many").status_code == 200
    process.terminate()
    assert process.wait(20) == 0


def test_when_no_other_can_be_started_the_server_says_so_and_ends(command, tiny_base, shelf, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base("bert"), base)
    process, _ = command("--model", str(base))
    shutil.rmtree(base)
    os.kill(computing(process), signal.SIGKILL)
    assert process.wait(20) == 2
    assert process.log.read_text().splitlines()[-1].startswith(f"textlora: {base}: no such folder")


def test_a_base_that_cannot_be_read_is_one_line(tmp_path, capfd):
    assert run(["serve", "--port", "0", "--model", str(tmp_path / "none")]) == 2
    assert (
        capfd.readouterr().err
        == f"textlora: {tmp_path / 'none'}: no such folder; give the folder of a base model, or a hub id\n"
    )


def test_the_process_that_listens_needs_no_torch():
    code = "import sys, textlora.server.app, textlora.server.run, textlora.server.folders; print('torch' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "False"
    )


@pytest.mark.parametrize(
    "kind", sorted(kinds(TextloraError).values(), key=lambda kind: kind.code), ids=lambda kind: kind.code
)
def test_errors_cross_between_processes(kind):
    ours, theirs = (Link(end) for end in socket.socketpair())
    theirs.send(told(kind("what is wrong: \ud800 ü", "what to do")))
    found = error_of(*ours.receive())
    assert type(found) is kind
    assert (found.message, found.fix) == ("what is wrong: \ud800 ü", "what to do")
    theirs.close()
    with pytest.raises(EOFError):
        ours.receive()
    ours.close()


def test_kill_leaves_nothing_behind(command, shelf, alone):
    before = {path: path.read_bytes() for path in shelf.rglob("*") if path.is_file()}
    process, url = command()
    stop = threading.Event()

    def load() -> int:
        answered = 0
        while not stop.is_set():
            try:
                httpx2.post(
                    f"{url}/adapters/single/predict", json={"inputs": TEXT}, timeout=5
                ).raise_for_status()
                answered += 1
            except httpx2.TransportError:
                break
        return answered

    with ThreadPoolExecutor(2) as pool:
        loads = [pool.submit(load) for _ in range(2)]
        time.sleep(0.3)
        process.kill()
        process.wait()
        assert all(one.result() > 0 for one in loads)
    _, url = command("--default-adapter", "single")
    assert_scores(httpx2.post(f"{url}/predict", json={"inputs": TEXT}).json(), alone("single").scores)
    assert {path: path.read_bytes() for path in shelf.rglob("*") if path.is_file()} == before


def test_a_port_that_is_taken_ends_with_2(tiny_base, capfd):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert run(["serve", "--port", str(port), "--model", str(tiny_base("bert"))]) == 2
    assert (
        capfd.readouterr().err
        == f"textlora: cannot listen on 127.0.0.1 port {port}: Address already in use; choose another --port\n"
    )


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_request_of_the_openapi_page_gets_a_5xx_or_an_undocumented_answer(mode, listen, shelf, tmp_path):
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    root = loading(tmp_path, shelf, "many")
    url, client = listen(default_adapter="single", load_from=(str(root),))
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    checked = [
        not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    ]
    operations = [found.ok() for found in schema.get_all_operations()]
    assert {operation.path for operation in operations} == set(client.app.openapi()["paths"])
    for operation in operations:
        if mode == "negative" and operation.method == "get" and "{name}" not in operation.path:
            continue  # nothing in it to get wrong
        fixed = (
            {"path_parameters": {"name": "single"}}
            if "{name}" in operation.path and mode == "positive"
            else {}
        )

        @settings(
            max_examples=25,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            database=None,
        )
        @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode), **fixed))
        def ask(case):
            case.call_and_validate(checks=checked)

        ask()
    assert httpx2.post(f"{url}/predict", json={"inputs": TEXT}).status_code == 200


def test_without_the_extra_it_says_what_to_install(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run(["serve"]) == 2
    assert 'pip install "textlora[serve]"' in capfd.readouterr().err
