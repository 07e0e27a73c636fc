"""Golden logits from a process of its own: the same values and errors, and what happens when it, or its
parent, ends."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_engine import Kind, make_adapter

import textlora.training.prover
from textlora import TextClassifier
from textlora.core.config import LoraConfig
from textlora.core.errors import AdapterError, ModelError
from textlora.training.prover import Prover

TEXTS = ["a fine film", "an utterly dull and far too long film that nobody liked", "ok"]


@pytest.fixture
def fresh(monkeypatch):
    """As in an interpreter that has neither imported transformers nor started a process."""
    monkeypatch.setattr(Prover, "_begun", False)
    monkeypatch.setattr(textlora.training.prover, "_imported", lambda: False)


def gone(process: int, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError, IndexError):
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                time.sleep(0.05)
                continue
        return True
    return False


def test_a_process_of_its_own_gives_the_same(fresh, tiny_base, tmp_path):
    base, asked = tiny_base("bert"), {}
    for pooling in ("first", "mean"):
        folder = make_adapter(tmp_path / pooling, base, Kind(LoraConfig(r=4), 3, pooling=pooling), seed=1)
        classifier = TextClassifier.load(folder, base=str(base), device="cpu")
        asked[pooling] = (
            (folder, base, len(classifier.meta.labels), pooling, classifier.tokenizer.encode(TEXTS)),
            classifier,
        )
    with Prover() as prover:
        process = prover._process
        for given, classifier in asked.values():
            logits = prover.golden(*given)
            assert logits.dtype == np.float32
            assert np.abs(logits - classifier.plain_logits(TEXTS)).max() < 1e-5
            assert np.ptp(logits) > 1e-2
        folder, base, labels, pooling, encoded = asked["first"][0]
        with pytest.raises(AdapterError, match=str(folder)):
            prover.golden(folder, base, labels + 1, pooling, encoded)
        with pytest.raises(ModelError):
            prover.golden(folder, tmp_path, labels, pooling, encoded)
        os.kill(process.pid, signal.SIGINT)  # Ctrl-C is for the parent
        again = prover.golden(*asked["mean"][0])
        assert np.array_equal(again, logits)
        assert prover.trouble is None
        process.kill()
        process.wait()
        assert np.abs(prover.golden(*asked["mean"][0]) - again).max() < 1e-5  # computed here
        assert "ended with code -9" in prover.trouble
        assert prover._process is None
    with Prover() as second:  # one process for an interpreter
        assert second._process is None
        assert np.abs(second.golden(*asked["mean"][0]) - again).max() < 1e-5
        assert second.trouble is None


def test_an_interpreter_that_cannot_be_started(fresh, tiny_base, tmp_path, monkeypatch):
    base = tiny_base("bert")
    folder = make_adapter(tmp_path / "adapter", base, Kind(LoraConfig(r=4)), seed=1)
    classifier = TextClassifier.load(folder, base=str(base), device="cpu")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with Prover() as prover:
        logits = prover.golden(
            folder, base, len(classifier.meta.labels), "first", classifier.tokenizer.encode(TEXTS)
        )
    assert np.abs(logits - classifier.plain_logits(TEXTS)).max() < 1e-5
    assert prover.trouble.startswith("no process could be started")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc")
@pytest.mark.parametrize("way", ["closed", "killed"])
def test_it_does_not_outlive_its_parent(way):
    script = "from textlora.training.prover import Prover; p = Prover().start(); print(p._process.pid, flush=True); input(); p.close(); print('closed', flush=True); input()"
    environment = os.environ | {"PYTHONPATH": str(Path(textlora.training.prover.__file__).parent.parent)}
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as parent:
        process = int(parent.stdout.readline())
        assert not gone(process, 0.2)
        if way == "killed":
            parent.kill()
        else:
            parent.stdin.write("\n")
            parent.stdin.flush()
            assert parent.stdout.readline() == "closed\n"
        assert gone(process)
        parent.kill()


def test_the_module_imports_nothing_heavy():
    script = "import sys, textlora.training.prover; print(*sorted(set(sys.modules) & {'numpy', 'torch', 'transformers', 'peft', 'safetensors'}))"
    environment = os.environ | {"PYTHONPATH": str(Path(textlora.training.prover.__file__).parent.parent)}
    assert (
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
        ).stdout.strip()
        == ""
    )
