"""Base models from the hub, against a small stand-in on this machine, and what is said when the hub is not there."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support import task_files

COMMIT, OLDER = "c" * 40, "d" * 40
WAY = "pass the path of a local folder with config.json, model.safetensors and tokenizer.json as --model"


class StandIn(BaseHTTPRequestHandler):
    """What the hub answers for one model, `org/tiny`, with a revision `main` and one named `v1`."""

    protocol_version = "HTTP/1.1"
    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.asked.append(f"{self.command} {self.path}")
        parts = self.path.split("?")[0].strip("/").split("/")
        names = sorted(p.name for p in self.folder.iterdir())
        if parts[:2] == ["api", "models"] and parts[2:4] == ["org", "tiny"]:
            revision = parts[5] if len(parts) > 5 else "main"
            commit = {"main": COMMIT, COMMIT: COMMIT, "v1": OLDER, OLDER: OLDER}.get(revision)
            if commit is None:
                self.say(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
            elif parts[4:5] == ["tree"]:
                entries = [{"type": "file", "path": name, "size": (self.folder / name).stat().st_size, "oid": self.etag(name)} for name in names]
                self.say(200, json.dumps(entries).encode(), {}, body)
            else:
                info = {"id": "org/tiny", "sha": commit, "siblings": [{"rfilename": name} for name in names], "tags": [], "private": False}
                self.say(200, json.dumps(info).encode(), {}, body)
        elif parts[:3] == ["org", "tiny", "resolve"] and parts[4] in names:
            data = (self.folder / parts[4]).read_bytes()
            commit = OLDER if parts[3] in ("v1", OLDER) else COMMIT
            self.say(200, data, {"ETag": f'"{self.etag(parts[4])}"', "X-Repo-Commit": commit}, body)
        elif "broken" in self.path:
            self.say(500, b"{}", {}, body)
        else:
            self.say(401, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

    def etag(self, name: str) -> str:
        return hashlib.sha1((self.folder / name).read_bytes()).hexdigest()

    def say(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub(tiny_base, tmp_path_factory) -> Iterator[tuple[str, list[str]]]:
    """Address of the stand-in, and what it was asked."""
    folder = shutil.copytree(tiny_base("bert"), tmp_path_factory.mktemp("hub") / "tiny")
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    (folder / "README.md").write_text("never fetched", encoding="utf-8")
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (StandIn,), {"folder": folder, "asked": asked}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()
    thread.join()


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def python(code: str, endpoint: str, home: Path, *arguments: object) -> tuple[list[Any], str]:
    """Run `code` with the hub at `endpoint` and its cache in `home`: the JSON lines it printed, and standard error."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


FIND = """
import json, sys, time
from textlora.base import find_base
from textlora.errors import ModelError
for asked in sys.argv[1:]:
    model, _, revision = asked.partition("@")
    start = time.perf_counter()
    try:
        files = find_base(model, revision or None)
        said = {"id": files.id, "revision": files.revision, "files": sorted(p.name for p in files.folder.iterdir()), "kind": files.config["model_type"]}
    except ModelError as error:
        said = {"error": str(error)}
    print(json.dumps(said | {"seconds": time.perf_counter() - start}))
"""


def test_a_base_from_the_hub(hub, tmp_path):
    endpoint, asked = hub
    asks = ("org/tiny", "org/tiny@v1", "org/tiny@main", "org/tiny@v9", "org/absent", "org/broken", "not a/name!", "../tiny", "a/b/c")
    found, err = python(FIND, endpoint, tmp_path, *asks)
    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    for answer, commit in zip(found[:3], (COMMIT, OLDER, COMMIT), strict=True):
        assert (answer["id"], answer["revision"], answer["files"], answer["kind"]) == ("org/tiny", commit, files, "bert")
    said = [answer["error"] for answer in found[3:]]
    assert said[0] == "org/tiny: no revision 'v9' on the hub; name a branch, tag or commit of it with --revision"
    assert said[1] == f"org/absent: no folder here and no such model on the hub (or it is private); {WAY}"
    assert said[2].startswith("org/broken: the hub ")
    assert said[2].endswith(f"; {WAY}")
    assert said[3] == f"not a/name!: neither a folder nor a hub id; {WAY}"
    assert said[4:] == [f"{name}: no such folder; give the folder of a base model, or a hub id" for name in ("../tiny", "a/b/c")]
    assert all("\n" not in message for message in said)
    assert not [line for line in asked if "pytorch_model.bin" in line or "README" in line]
    assert err == ""


TRAIN = """
import json, sys
from textlora import TextClassifier
from textlora.cli import run
train, output = sys.argv[1:3]
if train:
    assert run(["train", "--quiet", "--train", train, "--model", "org/tiny", "--output", output, "--epochs", "1", "--device", "cpu"]) == 0
classifier = TextClassifier.load(output)
print(json.dumps({"labels": classifier.meta.labels, "base": classifier.meta.base, "logits": classifier.logits(["a good film"]).tolist()}))
"""


def test_an_adapter_names_its_base_and_finds_it_again(hub, tiny_base, tmp_path):
    """Trained on a base from the hub, loaded without saying which, and once more when the hub is gone."""
    endpoint, _ = hub
    train, output, home = task_files(tmp_path, "single")["train"], tmp_path / "out", tmp_path / "home"
    (first,), _ = python(TRAIN, endpoint, home, train, output)
    assert first["labels"] == ["neg", "pos"]
    assert (first["base"]["id"], first["base"]["revision"]) == ("org/tiny", COMMIT)
    config = json.loads((output / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/tiny", COMMIT)
    card = (output / "README.md").read_text(encoding="utf-8")
    assert 'base_model: "org/tiny"' in card
    assert "base_model:adapter:org/tiny" in card
    assert str(home) not in card + (output / "textlora.json").read_text(encoding="utf-8") + json.dumps(config)
    (again,), _ = python(TRAIN, closed_port(), home, "", output)
    assert again == first


def test_a_base_when_the_hub_is_not_there(tmp_path):
    (one, two), err = python(FIND, closed_port(), tmp_path, "org/tiny", "bert-base-uncased")
    assert one["error"] == f"org/tiny: the hub cannot be reached and the model is not in its cache; {WAY}"
    assert two["error"] == f"bert-base-uncased: the hub cannot be reached and the model is not in its cache; {WAY}"
    assert one["seconds"] + two["seconds"] < 15
    assert err == ""


COMMAND = """
import json, sys, time
from textlora.cli import run
start = time.perf_counter()
code = run(sys.argv[1:])
print(json.dumps([code, time.perf_counter() - start]))
"""


def test_the_command_when_the_hub_is_not_there(tiny_base, tmp_path):
    output = tmp_path / "out"
    train = task_files(tmp_path, "single")["train"]
    ((code, seconds),), err = python(
        COMMAND, closed_port(), tmp_path, "train", "--quiet", "--train", train, "--model", "org/tiny", "--output", output
    )
    assert code == 2
    assert err == f"textlora: org/tiny: the hub cannot be reached and the model is not in its cache; {WAY}\n"
    ((code, more),), err = python(
        COMMAND, closed_port(), tmp_path, "train", "--quiet", "--train", "org/rows", "--model", tiny_base("bert"), "--output", output
    )
    assert code == 2
    assert err == (
        "textlora: org/rows: no file here, and the hub cannot be reached; check the name, or download it and give the local path; "
        "HF_HUB_OFFLINE=1 uses what was fetched before\n"
    )
    assert seconds + more < 15
    assert not output.exists()


def test_a_data_set_that_is_not_on_the_hub(hub, tiny_base, tmp_path):
    endpoint, _ = hub
    start = time.perf_counter()
    arguments = ("train", "--quiet", "--train", "org/rows", "--model", tiny_base("bert"), "--output", tmp_path / "out")
    ((code, _),), err = python(COMMAND, endpoint, tmp_path, *arguments)
    assert code == 2
    assert err == (
        "textlora: org/rows: no file here and no such data set on the hub (or it is private); check the name, or download it and give the local path\n"
    )
    assert time.perf_counter() - start < 30
