"""The proof's side of transformers + peft in a process of its own, whose imports (some five seconds) run
beside the training, not behind it.

    with Prover() as prover:            # before torch is imported here, where that can be: it costs a moment
        ...                             # read, train, save
        logits = prover.golden(...)     # of the saved folder, by plain transformers + peft

What is computed is the same either way: `ReferenceModel.from_adapter` on the files as they lie on the disk.
This module imports nothing heavy.

The process talks in JSON, a line each way, on its standard input and output. It keeps no model while it
waits, has one thread and a lower priority, looks for nothing on a network, leaves Ctrl-C to its parent, and
ends when its input does, so also when the parent is killed.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from textlora.core.errors import TextloraError, error_of, told

if TYPE_CHECKING:
    import numpy as np

    from textlora.data.tokenize import Encoded

NICE = (
    5  # beside a busy process the lowest priority would leave all of it for after the training (docs/log.md)
)
_CODE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from textlora.training.prover import main; main()"
_ALONE = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip


class Prover:
    """Golden logits of saved folders; a context manager. For one thread at a time.

    A process is started for the first of them in this interpreter only: who trains again and again imports
    transformers + peft once, here.

    Attributes:
        trouble: why this process computed itself although another was started, or should have been; None
            where all went as planned.
    """

    _begun = False  # whether this interpreter has started one

    def __init__(self) -> None:
        self.trouble: str | None = None
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[bytes] | None = None

    def start(self) -> Self:
        """Start the process, and return at once. Nothing where there is one, or where transformers + peft are
        imported here. Raises nothing."""
        if self._process is not None or Prover._begun or _imported():
            return self
        Prover._begun = True
        try:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed in `close`
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CODE, json.dumps(sys.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
                env=os.environ | _ALONE, text=True, encoding="utf-8", start_new_session=True,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            self.trouble = f"no process could be started ({error})"
            self.close()
        return self

    def golden(
        self,
        adapter_folder: Path,
        base_folder: Path,
        num_labels: int,
        pooling: str,
        encoded: Sequence["Encoded"],
    ) -> "np.ndarray":
        """Logits (N, C) float32 of N encoded texts by transformers + peft, in float32 on the CPU, from the
        files of a saved adapter.

        Where the process has ended or fails otherwise than by an error of ours, this one computes, and
        `trouble` says why.

        Raises:
            AdapterError, ModelError, UsageError: as `ReferenceModel.from_adapter` and its `forward` raise
                them.
        """
        import numpy as np

        given = {
            "adapter_folder": str(Path(adapter_folder).absolute()), "base_folder": str(Path(base_folder).absolute()), "num_labels": num_labels,
            "pooling": pooling, "rows": [[row.ids.tolist(), row.type_ids.tolist()] for row in encoded],
        }  # fmt: skip
        if self._process is not None:
            answer = self._ask(given)
            if "logits" in answer:
                return np.array(answer["logits"], dtype=np.float32)
            if "error" in answer:
                raise error_of(*answer["error"])
            self.trouble = answer["failed"]
            self.close()
        return np.array(golden_logits(**given), dtype=np.float32)

    def _ask(self, given: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        try:
            process.stdin.write(json.dumps(given) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())
        except (OSError, ValueError):  # it ended: nothing was read, or what was written went nowhere
            process.kill()
            return {"failed": f"its process ended with code {process.wait()}{self._last_words()}"}

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return f" ({lines[-1][:200]})" if lines else ""

    def close(self) -> None:
        """End the process, whatever it is at: it only reads."""
        process, errors, self._process, self._errors = self._process, self._errors, None, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what was written and nobody reads any more
                    stream.close()
        if errors is not None:
            errors.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()


def _imported() -> bool:
    """Whether transformers + peft are here already."""
    return "textlora.model.reference_model" in sys.modules


def golden_logits(
    adapter_folder: str, base_folder: str, num_labels: int, pooling: str, rows: list[list[list[int]]]
) -> list[list[float]]:
    """What `Prover.golden` gives, as plain values, computed here; `rows` holds ids and type ids of each text.
    Raises as it does."""
    import numpy as np

    from textlora.data.tokenize import Encoded
    from textlora.inference.classifier import encoded_logits
    from textlora.model.reference_model import ReferenceModel

    reference = ReferenceModel.from_adapter(
        Path(adapter_folder), Path(base_folder), num_labels, pooling=pooling
    )
    encoded = [
        Encoded(np.array(ids, dtype=np.int32), np.array(types, dtype=np.int8), len(ids))
        for ids, types in rows
    ]
    return [[float(value) for value in row] for row in encoded_logits(reference, encoded)]


def main() -> None:
    """The process: imports, then an answer to each line, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(AttributeError, OSError):
        os.nice(NICE)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    asked: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            asked.put(line)
        os._exit(0)  # the parent is done or gone, whatever is at work here

    threading.Thread(target=read, daemon=True).start()
    import torch

    import textlora.inference.classifier
    import textlora.model.reference_model  # noqa: F401

    torch.set_num_threads(1)
    while True:
        answers.write(json.dumps(_answer(json.loads(asked.get()))) + "\n")
        answers.flush()


def _answer(given: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"logits": golden_logits(**given)}
    except TextloraError as error:
        return {"error": told(error)}
    except Exception as error:  # the parent tries, and shows all of it
        return {"failed": f"{type(error).__name__} in its process: {error}"}
