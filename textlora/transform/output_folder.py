"""Folders that appear whole or not at all, and the tokenizer in them."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from textlora.core.errors import StorageError, UsageError
from textlora.core.files import write_text
from textlora.data.tokenize import TextTokenizer
from textlora.model.families import FAMILIES


def require_free(output: Path) -> None:
    """Refuse a path that holds something. Raises UsageError."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        raise UsageError(f"{output} exists and is not an empty folder", "choose another --output")


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Give a temporary folder beside `output`; on success it takes that name in one step, else it is removed.

    Raises:
        UsageError: `output` holds something.
        StorageError: the folder cannot be made.
    """
    require_free(output)
    output = output.absolute()
    missing = [parent for parent in output.parents if not parent.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".part", dir=output.parent))
    except OSError as error:
        raise StorageError(
            f"cannot write {output}: {error.strerror or error}", "choose another folder"
        ) from error
    try:
        yield part
        mask = os.umask(0)
        os.umask(mask)
        for path in part.rglob("*"):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        part.chmod(0o777 & ~mask)
        os.replace(part, output)  # over an empty folder too
    finally:
        shutil.rmtree(part, ignore_errors=True)
        for parent in missing:
            with contextlib.suppress(OSError):  # it holds the output
                parent.rmdir()


def write_tokenizer(
    tokenizer: TextTokenizer, sources: Sequence[Path], config: dict[str, Any], folder: Path, truncate: bool
) -> None:
    """Write tokenizer.json and tokenizer_config.json so that transformers cuts as the adapter does, as far as
    it can.

    Args:
        sources: folders, the first with a tokenizer_config.json gives the other settings.
        config: the base's, for whether there are segment ids.
        truncate: switch truncation on in tokenizer.json too, for readers that know no other place.
    """
    content = json.loads(tokenizer.backend.to_str())
    left = tokenizer.truncation == "tail"
    content["padding"] = None
    content["truncation"] = None
    if truncate:
        content["truncation"] = {
            "direction": "Left" if left else "Right",
            "max_length": tokenizer.max_length,
            "strategy": "LongestFirst",
            "stride": 0,
        }
    write_text(folder / "tokenizer.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    path = next((path for source in sources if (path := source / "tokenizer_config.json").is_file()), None)
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except ValueError:
        settings = {}
    dropped = (
        "name_or_path",
        "auto_map",
        "max_length",
        "stride",
        "truncation_strategy",
        "pad_to_multiple_of",
    )
    settings = {key: value for key, value in settings.items() if key not in dropped}
    family = next((family for family in FAMILIES if config["model_type"] in family.model_types), None)
    types = family.uses_type_ids if family else (config.get("type_vocab_size") or 0) > 1
    # The general class reads tokenizer.json as it stands; a family's own class builds another one from the
    # vocabulary.
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": tokenizer.max_length,
        "truncation_side": "left" if left else "right",
        "model_input_names": ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"],
    }
    write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
