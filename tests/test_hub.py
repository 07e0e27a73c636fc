"""Base models and adapters from the hub and to it, against a small stand-in on this machine, and what is said
when the hub is not there."""

import base64
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from huggingface_hub import ModelCard
from support import Trained, snapshot, task_files, trained

from textlora import TextClassifier
from textlora.adapters.card import model_card, pushed_card
from textlora.adapters.folder import lora_config, read_adapter, write_side_file, write_weights
from textlora.adapters.hub import _refuse_secrets, adapter_folder
from textlora.core.errors import AdapterError
from textlora.transform.inspect import inspect_folder, relabel_folder

COMMIT, OLDER = "c" * 40, "d" * 40
WAY = "pass the path of a local folder with config.json, model.safetensors and tokenizer.json as --model"
LOGIN = "set HF_TOKEN or run `hf auth login`"
OWNER, READER = "hf_" + "ownerowner" * 3, "hf_" + "readreader" * 3


@dataclass
class Repo:
    """Branch or tag -> (commit, files). A private one answers only its owner, a gated one nobody."""

    revisions: dict[str, tuple[str, dict[str, bytes]]]
    private: bool = False
    gated: bool = False


@dataclass
class Hub:
    """A stand-in of the hub: its address, what it holds, what it was asked, and commits, newest last."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)  # large files by SHA-256


class StandIn(BaseHTTPRequestHandler):
    """Answers as the hub does to what huggingface_hub 2.4 asks: info, tree and files of models, and all that
    a commit takes."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        parts = unquote(self.path.split("?")[0]).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if api else parts[:2])
        repo = self.hub.repos.get(name)
        if "broken" in self.path:
            return self.say(500, b"{}", {}, body)
        if repo is None or (repo.private and self.token != OWNER):
            return self.say(401, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        if repo.gated:
            return self.say(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        wanted = (parts[5] if len(parts) > 5 else "main") if api else parts[3]
        found = repo.revisions.get(wanted) or next(
            (r for r in repo.revisions.values() if r[0] == wanted), None
        )
        if found is None:
            return self.say(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        commit, files = found
        if api and parts[4:5] == ["tree"]:
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": etag(data)}
                for path, data in sorted(files.items())
            ]
            self.say(200, json.dumps(entries).encode(), {}, body)
        elif api:
            info = {
                "id": name,
                "sha": commit,
                "siblings": [{"rfilename": path} for path in files],
                "tags": [],
                "private": repo.private,
            }
            self.say(200, json.dumps(info).encode(), {}, body)
        elif parts[2] == "resolve" and "/".join(parts[4:]) in files:
            data = files["/".join(parts[4:])]
            self.say(200, data, {"ETag": f'"{etag(data)}"', "X-Repo-Commit": commit}, body)
        else:
            self.say(404, b"{}", {"X-Error-Code": "EntryNotFound"}, body)

    def do_POST(self) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        data = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(self.path.split("?")[0]).strip("/")
        if path == "api/validate-yaml":
            licensed = "license" in json.loads(data)["content"]
            return self.reply(
                {"errors": [], "warnings": [] if licensed else [{"message": "no license is named"}]}
            )
        if self.token != OWNER:
            return self.say(403 if self.token else 401, b'{"error": "no right to write"}', {}, True)
        if path == "api/repos/create":
            asked = json.loads(data)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.hub.repos:
                return self.say(409, json.dumps({"url": f"{self.hub.url}/{name}"}).encode(), {}, True)
            self.hub.repos[name] = Repo(
                {"main": ("0" * 40, {})}, private=asked.get("visibility") == "private"
            )
            return self.reply({"url": f"{self.hub.url}/{name}"})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": o["oid"],
                    "size": o["size"],
                    "actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}},
                }
                for o in json.loads(data)["objects"]
            ]
            return self.reply({"transfer": "basic", "objects": objects})
        _, _, owner, short, job, revision = path.split("/")
        repo = self.hub.repos[f"{owner}/{short}"]
        if job == "branch":
            if revision in repo.revisions:
                return self.say(409, b"{}", {}, True)
            repo.revisions[revision] = repo.revisions["main"]
            return self.reply({})
        if job == "preupload":
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(data)["files"]
            ]
            return self.reply({"files": modes})
        assert job == "commit", path
        lines = [json.loads(line) for line in data.splitlines()]
        files = dict(repo.revisions[revision][1])
        for line in lines[1:]:
            value = line["value"]
            files[value["path"]] = (
                self.hub.stored[value["oid"]]
                if line["key"] == "lfsFile"
                else base64.b64decode(value["content"])
            )
        commit = hashlib.sha1(data).hexdigest()
        repo.revisions[revision] = (commit, files)
        self.hub.commits.append(
            {
                "repo": f"{owner}/{short}",
                "revision": revision,
                "summary": lines[0]["value"]["summary"],
                "files": files,
            }
        )
        return self.reply(
            {
                "commitUrl": f"{self.hub.url}/{owner}/{short}/commit/{commit}",
                "commitOid": commit,
                "success": True,
            }
        )

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(data).hexdigest() == self.path.rpartition("/")[2]
        self.hub.stored[self.path.rpartition("/")[2]] = data
        self.say(200, b"", {}, True)

    @property
    def token(self) -> str:
        return (self.headers["Authorization"] or "").removeprefix("Bearer ")

    def reply(self, record: dict[str, Any]) -> None:
        self.say(200, json.dumps(record).encode(), {}, True)

    def say(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": str(len(data))} | headers
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def stand_in(tiny_base) -> Iterator[Hub]:
    """The stand-in with one base, `org/tiny`, that has a revision `main` and one named `v1`."""
    files = files_of(tiny_base("bert")) | {
        "pytorch_model.bin": b"never fetched",
        "README.md": b"never fetched",
    }
    hub = Hub(repos={"org/tiny": Repo({"main": (COMMIT, files), "v1": (OLDER, files)})})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (StandIn,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def hub(stand_in) -> tuple[str, list[str]]:
    """Address of the stand-in, and what it was asked."""
    return stand_in.url, stand_in.asked


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def python(
    code: str, endpoint: str, home: Path, *arguments: object, **variables: str
) -> tuple[list[Any], str]:
    """Run `code` with the hub at `endpoint` and its cache in `home`: the JSON lines it printed, and standard
    error."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
    }
    environment |= {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "no_proxy": "127.0.0.1",
    }
    environment |= {"HF_HUB_DISABLE_XET": "1", **variables}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


FIND = """
import json, sys, time
from textlora.model.base import find_base
from textlora.core.errors import ModelError
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
    asks = (
        "org/tiny",
        "org/tiny@v1",
        "org/tiny@main",
        "org/tiny@v9",
        "org/absent",
        "org/broken",
        "not a/name!",
        "../tiny",
        "a/b/c",
    )
    found, err = python(FIND, endpoint, tmp_path, *asks)
    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    for answer, commit in zip(found[:3], (COMMIT, OLDER, COMMIT), strict=True):
        assert (answer["id"], answer["revision"], answer["files"], answer["kind"]) == (
            "org/tiny",
            commit,
            files,
            "bert",
        )
    said = [answer["error"] for answer in found[3:]]
    assert (
        said[0] == "org/tiny: no revision 'v9' on the hub; name a branch, tag or commit of it with --revision"
    )
    assert said[1] == f"org/absent: no folder here and no such model on the hub (or it is private); {WAY}"
    assert said[2].startswith("org/broken: the hub ")
    assert said[2].endswith(f"; {WAY}")
    assert said[3] == f"not a/name!: neither a folder nor a hub id; {WAY}"
    assert said[4:] == [
        f"{name}: no such folder; give the folder of a base model, or a hub id"
        for name in ("../tiny", "a/b/c")
    ]
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
    assert (
        two["error"]
        == f"bert-base-uncased: the hub cannot be reached and the model is not in its cache; {WAY}"
    )
    assert one["seconds"] + two["seconds"] < 15
    assert err == ""


COMMANDS = """
import contextlib, io, json, os, sys
from textlora.cli import run
for line in sys.argv[1:]:
    token, *arguments = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(arguments)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def commands(endpoint: str, home: Path, *lines: tuple[object, ...]) -> list[tuple[int, str, str]]:
    """Exit code, output and error of each (token, command, ...)."""
    done, err = python(
        COMMANDS, endpoint, home, *(json.dumps([str(a) if a else "" for a in line]) for line in lines)
    )
    assert err == ""
    return [tuple(item) for item in done]


def test_commands_when_the_hub_is_not_there(tiny_base, adapter, tmp_path):
    output, start = tmp_path / "out", time.perf_counter()
    train = ("train", "--quiet", "--output", output)
    base, rows, push = commands(
        closed_port(),
        tmp_path,
        ("", *train, "--train", task_files(tmp_path, "single")["train"], "--model", "org/tiny"),
        ("", *train, "--train", "org/rows", "--model", tiny_base("bert")),
        (OWNER, "push", adapter, "org/new"),
    )
    assert base == (
        2,
        "",
        f"textlora: org/tiny: the hub cannot be reached and the model is not in its cache; {WAY}\n",
    )
    said = (
        "no file here, and the hub cannot be reached; check the name, or download it and give the local path"
    )
    assert rows == (2, "", f"textlora: org/rows: {said}; HF_HUB_OFFLINE=1 uses what was fetched before\n")
    assert push[:2] == (2, "")
    assert re.fullmatch(r"textlora: org/new: the upload failed \(.+\); try again\n", push[2])
    assert time.perf_counter() - start < 30
    assert not output.exists()


def test_a_data_set_that_is_not_on_the_hub(stand_in, tiny_base, tmp_path):
    start = time.perf_counter()
    train = (
        "train",
        "--quiet",
        "--train",
        "org/rows",
        "--model",
        tiny_base("bert"),
        "--output",
        tmp_path / "out",
    )
    said = "no file here and no such data set on the hub (or it is private); check the name, or download it and give the local path"
    assert commands(stand_in.url, tmp_path, ("", *train)) == [(2, "", f"textlora: org/rows: {said}\n")]
    assert time.perf_counter() - start < 30


# --- adapters ---


def for_hub(run: Trained, target: Path) -> Path:
    """The adapter as if its base had been `org/tiny` of the hub, without its run."""
    shutil.copytree(run.folder, target, ignore=shutil.ignore_patterns("run"))
    adapter = read_adapter(target)
    meta = replace(adapter.meta, base=adapter.meta.base | {"id": "org/tiny", "revision": COMMIT})
    write_weights(
        target, adapter.config | {"base_model_name_or_path": "org/tiny", "revision": COMMIT}, adapter.tensors
    )
    (target / "README.md").write_text(
        model_card(meta, lora_config(adapter), "AutoModelForSequenceClassification", "", {}, "tiny"),
        encoding="utf-8",
    )
    write_side_file(target, meta)
    return target


@pytest.fixture(scope="module")
def adapter(stand_in, tiny_base, tmp_path_factory) -> Path:
    """An adapter on `org/tiny`; the stand-in has it as `org/adapter`, under other label names in `v1`, and in
    repositories with some trouble."""
    folder = for_hub(trained(tiny_base, tmp_path_factory), tmp_path_factory.mktemp("adapter") / "mine")
    other = Path(shutil.copytree(folder, folder.parent / "other"))
    relabel_folder(other, ("neg=no", "pos=yes"))
    files = files_of(folder)
    strays = {f"run/{name}": data for name, data in files.items()} | dict.fromkeys(
        ("training_args.bin", "optimizer.pt", "tokenizer.pkl"), b"never"
    )
    stand_in.repos |= {
        "org/adapter": Repo({"main": ("a" * 40, files | strays), "v1": ("b" * 40, files_of(other))}),
        "org/secret": Repo({"main": ("e" * 40, files)}, private=True),
        "org/gated": Repo({"main": ("f" * 40, files)}, gated=True),
        "org/pickled": Repo(
            {
                "main": (
                    "1" * 40,
                    {"adapter_config.json": files["adapter_config.json"], "adapter_model.bin": b"never"},
                )
            }
        ),
        "org/damaged": Repo(
            {
                "main": (
                    "2" * 40,
                    files | {"adapter_model.safetensors": files["adapter_model.safetensors"][:-1]},
                )
            }
        ),
        "org/plain": Repo(
            {"main": ("3" * 40, {name: data for name, data in files.items() if name != "textlora.json"})}
        ),
    }
    return folder


LOAD = """
import json, os, sys
from textlora import TextClassifier
from textlora.core.errors import TextloraError
for asked in sys.argv[1:]:
    token, _, asked = asked.rpartition("=")
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    path, _, revision = asked.partition("@")
    try:
        classifier = TextClassifier.load(path, revision=revision or None, device="cpu")
        said = {"labels": classifier.meta.labels, "logits": classifier.logits(["a good film"]).tolist()}
    except TextloraError as error:
        said = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(said))
"""


def test_adapters_from_the_hub(stand_in, adapter, tiny_base, tmp_path):
    home = tmp_path / "home"
    troubles = (
        "org/adapter@v9",
        "org/absent",
        "org/secret",
        "org/gated",
        "org/pickled",
        "org/tiny",
        "org/broken",
        "org/damaged",
        "org/plain",
    )
    places = ("out/my adapter", "a/b/c", f"{adapter}@v1")
    found, _ = python(
        LOAD, stand_in.url, home, "org/adapter", "org/adapter@v1", *troubles, *places, f"{OWNER}=org/secret"
    )
    expected = TextClassifier.load(adapter, base=str(tiny_base("bert"))).logits(["a good film"])
    assert found[0]["labels"] == ["neg", "pos"]
    assert np.allclose(found[0]["logits"], expected, atol=1e-6)
    assert found[1] == {"labels": ["no", "yes"], "logits": found[0]["logits"]}
    assert found[-1] == found[0]
    said = [answer["error"] for answer in found[2:-1]]
    assert all("\n" not in line for line in said)
    assert (
        said[0]
        == "AdapterError: org/adapter: no revision 'v9' on the hub; name a branch, tag or commit of it with --revision"
    )
    nothing = (
        "no folder here and no such adapter on the hub (or it is private); check the name; for a private one "
        + LOGIN
    )
    assert said[1:3] == [f"AdapterError: org/absent: {nothing}", f"AdapterError: org/secret: {nothing}"]
    assert (
        said[3]
        == f"AdapterError: org/gated: its owner grants access one by one (gated); ask for it on its page on the hub, then {LOGIN}"
    )
    pickled = "it is no adapter, or one saved as a pickle, which can run code and is not fetched"
    assert said[4:6] == [
        f"AdapterError: {name}: holds no adapter_model.safetensors; {pickled}"
        for name in ("org/pickled", "org/tiny")
    ]
    assert said[6].startswith(
        "AdapterError: org/broken: no folder here, and the hub answered with an error (Server error '500"
    )
    assert said[7].endswith(
        "adapter_model.safetensors: was changed after it was saved (SHA-256 differs); copy the adapter again"
    )
    assert "has no textlora.json" in said[8]
    assert said[9:11] == [
        f"AdapterError: {name}: no such adapter folder" for name in ("out/my adapter", "a/b/c")
    ]
    assert (
        said[11]
        == f"UsageError: --revision v1: {adapter} is a folder; leave it out; only adapters on the hub have revisions"
    )
    assert not [line for line in stand_in.asked if "/run/" in line or line.endswith((".bin", ".pt", ".pkl"))]

    unreachable, _ = python(LOAD, closed_port(), home, "org/adapter", "org/adapter@v1", "org/absent")
    offline, _ = python(LOAD, stand_in.url, home, "org/adapter", "org/absent", HF_HUB_OFFLINE="1")
    assert unreachable[:2] == found[:2]
    assert offline[0] == found[0]
    absent = "AdapterError: org/absent: no folder here, {} and the adapter is not in the hub's cache; give the path of a local folder"
    assert [unreachable[2]["error"], offline[1]["error"]] == [
        absent.format(why) for why in ("the hub cannot be reached", "HF_HUB_OFFLINE is set")
    ]


def test_a_folder_here_goes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "adapter").mkdir(parents=True)
    assert adapter_folder("org/adapter") == Path("org/adapter")


def test_commands_on_an_adapter_of_the_hub(stand_in, adapter, tmp_path):
    data = task_files(tmp_path, "single")["test"]
    lines = [
        ("predict", "--data", data, "--json", "--logits", "--device", "cpu"),
        ("evaluate", "--data", data, "--json", "--device", "cpu"),
    ]
    lines.append(("inspect", "--against", "org/tiny", "--json"))
    *done, again, renamed, refused = commands(
        stand_in.url,
        tmp_path,
        *(("", line[0], name, *line[1:]) for line in lines for name in ("org/adapter", adapter)),
        ("", "predict", "org/adapter", "--revision", "v1", "--data", data, "--json", "--device", "cpu"),
        ("", "inspect", "org/adapter", "--revision", "v1", "--json"),
        ("", "inspect", "org/adapter", "--relabel", "neg=no"),
    )
    assert [(code, err) for code, _, err in done] == [(0, "")] * 6
    assert done[0] == done[1]
    assert json.loads(done[2][1])["test"] == json.loads(done[3][1])["test"]
    hub, here = json.loads(done[4][1]), json.loads(done[5][1])
    assert hub["fits"] is True
    assert hub.pop("folder") == "org/adapter"
    assert hub == {key: value for key, value in here.items() if key != "folder"}
    names = {"neg": "no", "pos": "yes"}
    labels = [[json.loads(line)["label"] for line in out.splitlines()] for _, out, _ in (done[0], again)]
    assert labels[1] == [names[label] for label in labels[0]]
    assert json.loads(renamed[1])["labels"] == ["no", "yes"]
    assert refused == (2, "", "textlora: org/adapter: no such adapter folder\n")


# --- push ---

PUSHED = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "textlora.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


def test_push_and_load_again(stand_in, adapter, tiny_base, tmp_path):
    folder = Path(shutil.copytree(adapter, tmp_path / "mine"))
    (folder / "run").mkdir()
    for name in ("run/metrics.jsonl", "checkpoint.pt", "notes.txt", "special.bin", "vocab.txt"):
        (folder / name).write_text("mine alone", encoding="utf-8")
    before = snapshot(folder)
    data = task_files(tmp_path, "single")["test"]
    predict = ("--data", data, "--json", "--logits", "--device", "cpu")
    done = commands(
        stand_in.url,
        tmp_path / "home",
        (OWNER, "push", folder, "org/mine", "--private", "--message", "First", "--json"),
        (OWNER, "push", folder, "org/mine", "--revision", "v2"),
        (OWNER, "predict", "org/mine", *predict),
        (OWNER, "inspect", "org/mine", "--json"),
        ("", "predict", folder, *predict),
    )
    note = "Warnings while validating metadata in README.md: - no license is named"
    assert [err for _, _, err in done] == [f"textlora: {note}\n"] * 2 + [""] * 3
    assert [code for code, _, _ in done] == [0] * 5
    assert snapshot(folder) == before
    first, second = stand_in.commits[-2:]
    assert (first["repo"], first["revision"], first["summary"]) == ("org/mine", "main", "First")
    assert (second["revision"], second["summary"]) == ("v2", "Upload mine")
    assert sorted(first["files"]) == PUSHED
    assert first["files"] == second["files"]
    assert stand_in.repos["org/mine"].private
    record = json.loads(done[0][1])
    commit = stand_in.repos["org/mine"].revisions["main"][0]
    assert record == {
        "repo": "org/mine", "url": f"{stand_in.url}/org/mine", "commit": commit, "files": PUSHED,
        "bytes": sum(map(len, first["files"].values())), "notes": [note],
    }  # fmt: skip
    assert done[1][1].startswith(
        f"pushed 6 files, {record['bytes']:,} bytes, to {stand_in.url}/org/mine (commit "
    )
    assert done[2][1] == done[4][1]
    facts = json.loads(done[3][1])
    assert facts["edited"] == []
    assert facts["fingerprint"] == inspect_folder(folder)["fingerprint"]
    for name in PUSHED:
        if name not in (
            "README.md",
            "textlora.json",
        ):  # the card names the repository now, and its hash follows
            assert first["files"][name] == before[name]
    card = ModelCard(first["files"]["README.md"].decode())
    assert (card.data.library_name, card.data.pipeline_tag, card.data.base_model) == (
        "peft",
        "text-classification",
        "org/tiny",
    )
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert 'TextClassifier.load("org/mine")' in card.text
    assert 'PeftModel.from_pretrained(base, "org/mine")' in card.text


def test_push_refuses(stand_in, adapter, tmp_path):
    def copy(name: str) -> Path:
        return Path(shutil.copytree(adapter, tmp_path / name))

    def side(folder: Path, **changes: Any) -> Path:
        write_side_file(folder, replace(read_adapter(folder).meta, **changes))
        return folder

    damaged, plain, told = copy("damaged"), copy("plain"), copy("told")
    (damaged / "tokenizer.json").write_text("{}", encoding="utf-8")
    (plain / "textlora.json").unlink()
    with open(told / "README.md", "a", encoding="utf-8") as file:
        file.write(f"\nuse {READER}\n")
    owned = side(copy("owned"), training={"note": f"with {OWNER}"})
    local = side(copy("local"), base=read_adapter(adapter).meta.base | {"id": str(tmp_path / "base")})
    windows = side(copy("windows"), training={"data": r"C:\Users\me\rows.csv"})
    card = copy("card")
    (card / "README.md").write_text("---\ntags: [\n---\n", encoding="utf-8")
    cases = [
        (OWNER, damaged, "org/new", f"{damaged / 'tokenizer.json'}: was changed after it was saved (SHA-256 differs); copy the adapter again"),
        (OWNER, plain, "org/new", f"{plain}: no textlora.json, so labels and task would be missing on the hub; only finished textlora folders are pushed"),
        (OWNER, told, "org/new", "README.md holds a hub token; take it out, and revoke the token"),
        (OWNER, owned, "org/new", "textlora.json holds a hub token; make the folder again without it, and revoke the token"),
        (OWNER, local, "org/new", f"README.md names a path of this machine: {tmp_path / 'base'}; take it out"),
        (OWNER, windows, "org/new", r"textlora.json names a path of this machine: C:\\Users\\me\\rows.csv; make the folder again without it"),
        (OWNER, card, "org/new", f"{card / 'README.md'}: the lines between --- and --- are not YAML ("),
        (OWNER, tmp_path / "nowhere", "org/new", f"{tmp_path / 'nowhere'}: no such adapter folder"),
        (OWNER, adapter, "new", "new: names no owner; give owner/name"),
        (OWNER, adapter, "org/new/one", "org/new/one: not the id of a hub repository; give owner/name"),
        ("", adapter, "org/new", f"there is no hub token, so nothing can be pushed; {LOGIN}"),
        (READER, adapter, "org/new", "org/new: the hub does not let you write there ("),
        (OWNER, adapter, "org/adapter", "org/adapter is already there and public; make it private on its page first, or leave out --private"),
    ]  # fmt: skip
    before, commits, names = snapshot(tmp_path), len(stand_in.commits), set(stand_in.repos)
    done = commands(
        stand_in.url,
        tmp_path.parent / "home",
        *((token, "push", folder, name, "--private") for token, folder, name, _ in cases),
    )
    for (code, out, err), (*_, said) in zip(done, cases, strict=True):
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert err.startswith(f"textlora: {said}"), err
    assert (len(stand_in.commits), set(stand_in.repos)) == (commits, names)
    assert snapshot(tmp_path) == before


# --- the card ---


def test_card_for_the_hub(tiny_base, tmp_path_factory, tmp_path):
    """What the hub reads from the card of each task; a label that looks like a path is no path."""
    for task, metric in (("single", "accuracy"), ("multi", "micro_f1"), ("regression", "spearman")):
        folder = Path(
            shutil.copytree(
                trained(tiny_base, tmp_path_factory, task=task).folder,
                tmp_path / task,
                ignore=shutil.ignore_patterns("run"),
            )
        )
        meta = read_adapter(folder).meta
        text = pushed_card(folder / "README.md", meta, lora_config(read_adapter(folder)), "me/my-task")
        data = ModelCard(text).data
        assert (data.pipeline_tag, data.library_name) == ("text-classification", "peft")
        assert data.to_dict()["id2label"] == {str(i): label for i, label in enumerate(meta.labels)}
        results = {result.metric_type: result.metric_value for result in data.eval_results}
        assert results[metric] == round(meta.scores["test"][metric], 6)
        assert {result.dataset_split for result in data.eval_results} == {"test"}
        assert "path/to/this/folder" not in text


def test_card_keeps_what_its_owner_wrote(adapter, tmp_path):
    folder = read_adapter(adapter)
    lora, card = lora_config(folder), tmp_path / "README.md"
    card.write_text(
        "---\nlicense: mit\nlanguage: [en, ko]\ntags: [film, lora]\nbase_model: wrong/one\n---\n\n# Mine\n\nRead me.\n",
        encoding="utf-8",
    )
    found = ModelCard(pushed_card(card, folder.meta, lora, "me/film"))
    assert found.text.strip() == "# Mine\n\nRead me."
    assert (found.data.license, found.data.language, found.data.base_model) == (
        "mit",
        ["en", "ko"],
        "org/tiny",
    )
    assert found.data.tags == [
        "lora",
        "peft",
        "text-classification",
        "textlora",
        "base_model:adapter:org/tiny",
        "film",
    ]
    card.write_text("no metadata at all\n", encoding="utf-8")
    found = ModelCard(pushed_card(card, folder.meta, lora, "me/film"))
    assert (found.text.strip(), found.data.base_model) == ("no metadata at all", "org/tiny")
    card.unlink()
    fresh = ModelCard(
        pushed_card(
            card,
            replace(folder.meta, pooling="mean", scores={}, base=folder.meta.base | {"id": None}),
            lora,
            "me/film",
        )
    )
    assert fresh.text.strip().startswith("# film\n")
    assert (fresh.data.library_name, fresh.data.base_model, fresh.data.eval_results) == (
        "textlora",
        None,
        None,
    )
    assert fresh.data.tags == ["lora", "textlora", "text-classification"]


def test_labels_that_look_like_paths_are_pushed(adapter, tmp_path):
    folder = read_adapter(shutil.copytree(adapter, tmp_path / "mine"))
    meta = replace(folder.meta, labels=("/usr/bin", "/tmp/other"))
    write_side_file(folder.path, meta)
    (folder.path / "README.md").write_text(
        pushed_card(folder.path / "nowhere", meta, lora_config(folder), "me/paths"), encoding="utf-8"
    )
    _refuse_secrets(sorted(folder.path.iterdir()), meta, OWNER)
    with pytest.raises(AdapterError, match="names a path of this machine: /usr/bin"):
        _refuse_secrets(sorted(folder.path.iterdir()), folder.meta, OWNER)
