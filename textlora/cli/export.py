"""`textlora export`: ONNX."""

from pathlib import Path
from typing import Any

import click

from textlora.cli.base import DATA_FLAGS, app, folder_options, json_option, load_classifier, print_json
from textlora.cli.options import CommaList, setting_options
from textlora.core.errors import UsageError

_MERGED = ("int8", "data", "limit_eval", *DATA_FLAGS)
_BASE = ("target_modules", "pooling")
_ADAPTER = ("base", "labels", "problem_type", "revision", "no_verify")


@app.command()
@folder_options
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder to write, new or empty; with --as-adapter a file.",
)
@click.option("--int8", is_flag=True, help="Write an int8 version too, and say what it costs.")
@click.option(
    "--data", metavar="DATA", help="Labelled rows to compare answers and accuracy on: file, folder or hub id."
)
@setting_options((*DATA_FLAGS, "limit_eval"))
@click.option("--seed", type=int, default=42, help="Seed that picks --limit-eval rows.  [default: 42]")
@click.option(
    "--adapters-as-inputs",
    "graph",
    is_flag=True,
    help="FOLDER is a base model: write one graph that takes any of its adapters as inputs.",
)
@click.option(
    "--target-modules",
    type=CommaList(),
    metavar="NAMES",
    help="Its dense layers that can take LoRA. Default: all.",
)
@click.option(
    "--pooling",
    type=click.Choice(("first", "mean")),
    help="What its heads see.  [default: as --pooling auto of train]",
)
@click.option(
    "--as-adapter",
    "alone",
    is_flag=True,
    help="Write the adapter alone, an .onnx_adapter file for such a graph.",
)
@json_option
def export(
    output: Path,
    data: str | None,
    limit_eval: int | None,
    seed: int,
    graph: bool,
    alone: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Write a merged classifier as ONNX, checked in ONNX Runtime.

    textlora export my-adapter --output my-onnx --int8 --data test.csv

    Or, with --adapters-as-inputs, a base model whose adapters are inputs; with --as-adapter such an adapter.
    """
    if graph and alone:
        raise UsageError(
            "--adapters-as-inputs writes a base model and --as-adapter an adapter", "give one of them"
        )
    mode = "--adapters-as-inputs" if graph else "--as-adapter" if alone else "a merged classifier"
    foreign = (*_MERGED, *_ADAPTER) if graph else (*_MERGED, *_BASE) if alone else _BASE
    for name in foreign:
        if {**flags, "data": data, "limit_eval": limit_eval}[name]:
            raise UsageError(
                f"--{'model' if name == 'base' else name.replace('_', '-')} has no meaning for {mode}"
            )
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "textlora export needs onnx and onnxruntime", 'install them with pip install "textlora[onnx]"'
        ) from error
    columns, int8 = {name: flags.pop(name) for name in DATA_FLAGS}, flags.pop("int8")
    places = {name: flags.pop(name) for name in _BASE}
    if graph:
        from torch import set_num_threads

        from textlora.model.base import base_pooling, find_base
        from textlora.transform.onnx import export_base

        if flags["threads"]:
            set_num_threads(flags["threads"])
        files = find_base(str(flags["folder"]))
        result = export_base(
            files,
            output,
            pooling=places["pooling"] or base_pooling(files)[0],
            target_modules=places["target_modules"],
        )
    else:
        classifier = load_classifier(**flags)
        from textlora.adapters.folder import read_adapter
        from textlora.adapters.hub import adapter_folder
        from textlora.inference.classifier import find_adapter_base
        from textlora.inference.evaluate import read_rows
        from textlora.transform.onnx import export_adapter, export_classifier

        files = find_adapter_base(
            read_adapter(adapter_folder(flags["folder"], flags["revision"])), flags["base"]
        )
        if alone:
            result = export_adapter(classifier, files, output)
        else:
            table = None if data is None else read_rows(data, columns, classifier, limit_eval, seed)
            result = export_classifier(classifier, files, output, int8=int8, table=table)
    if as_json:
        print_json(result)
    else:
        click.echo("\n".join(_lines(result)))


def _lines(result: dict[str, Any]) -> list[str]:
    lines = [f"largest logit difference from textlora: {_differences(result)}"]
    if "score_difference" in result:
        lines.append(f"largest score difference from predict: {result['score_difference']:.2g}")
    if int8 := result.get("int8"):
        lines.append(
            f"int8: largest logit difference {_differences(int8)}, of a score {int8['score_difference']:.2g}"
        )
    if "test" in result:
        lines.append(
            f"metrics on {result['rows']} rows:" + ("              float32     int8" if int8 else "")
        )
        for name, value in result["test"].items():
            shown = [value, int8["test"][name]] if int8 else [value]
            lines.append(
                f"  {name:24}"
                + "".join(f" {'undefined' if x is None else format(x, '.4f'):>8}" for x in shown)
            )
    if int8 and "changed" in int8:
        lines.append(f"int8 decides {int8['changed']} of {result['rows']} rows otherwise")
    if "adapted" in result:
        lines.append(
            f"{result['adapted']} dense layers take LoRA; tried with {result['adapters']} random adapters"
        )
    lines += [f"{name}: {size / 1e6:.1f} MB" for name, size in result["bytes"].items()]
    return [
        *lines,
        f"saved to {result['output']}"
        + (f" (opset {result['opset']})" if "opset" in result else f" and {result['facts']}"),
    ]


def _differences(record: dict[str, Any]) -> str:
    return f"{record['golden']:.2g} on golden examples" + (
        f", {record['difference']:.2g} on rows" if "difference" in record else ""
    )
