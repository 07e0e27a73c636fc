"""`textlora merge`, `extract` and `combine`: adapters into classifiers, back out of them, and into one
another."""

from pathlib import Path
from typing import Any

import click

from textlora.cli.base import DATA_FLAGS, app, folder_options, json_option, load_classifier, print_json
from textlora.cli.options import CommaList, setting_options
from textlora.core.errors import UsageError

_TEXT_FLAGS = ("text_column", "text_pair_column", "encoding")
_output = click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder to write, new or empty.",
)


@app.command()
@folder_options
@_output
@click.option(
    "--dtype",
    type=click.Choice(("float32", "bfloat16", "float16")),
    default="float32",
    help="Of the written weights.  [default: float32]",
)
@click.option(
    "--data",
    metavar="DATA",
    help="Rows to compare logits on, besides the golden examples: file, folder or hub id.",
)
@setting_options((*_TEXT_FLAGS, "limit_eval"))
@click.option("--seed", type=int, default=42, help="Seed that picks --limit-eval rows.  [default: 42]")
@json_option
def merge(
    output: Path, dtype: str, data: str | None, limit_eval: int | None, seed: int, as_json: bool, **flags: Any
) -> None:
    """Merge an adapter into its base: a folder that needs no textlora.

    textlora merge my-adapter --output my-classifier --data test.csv

    transformers loads it; of a mean-pooled adapter sentence-transformers, and transformers with
    trust_remote_code=True.
    """
    columns = {name: flags.pop(name) for name in _TEXT_FLAGS}
    from textlora.adapters.folder import read_adapter
    from textlora.adapters.hub import adapter_folder
    from textlora.inference.classifier import find_adapter_base
    from textlora.transform.merge import merge

    classifier = load_classifier(**flags)
    rows = [] if data is None else _texts(data, columns, classifier, limit_eval, seed)
    folder = adapter_folder(flags["folder"], flags["revision"])
    result = merge(
        classifier, find_adapter_base(read_adapter(folder), flags["base"]), folder, output, dtype, rows
    )
    if as_json:
        print_json(result)
        return
    click.echo(f"{result['layers']} layers and the head merged into a copy of the base, in {dtype}")
    click.echo(
        f"largest logit difference on {result['rows']} rows, from the written files in a fresh process: {result['difference']:.2g}"
    )
    click.echo(f"  (logits reach {result['largest_logit']:.3g})")
    click.echo(f"largest score difference from predict: {result['score_difference']:.2g}")
    if dtype != "float32":
        click.echo(
            f"  rounding the exact merge once makes {result['rounding']:.2g}; computed in {dtype} too, {result['as_loaded']:.2g}"
        )
    if result["left_out"]:
        click.echo(
            f"  {result['left_out']} longer rows left out: there is no head-tail truncation without textlora, and their end is cut"
        )
    if result["pooling"] == "mean":
        click.echo(
            "for sentence-transformers, whose encode gives the logits, and for transformers with trust_remote_code=True"
        )
    click.echo(f"saved to {result['output']}")


def _texts(
    data: str, columns: dict[str, str | None], classifier: Any, limit: int | None, seed: int
) -> list[tuple[str, str | None]]:
    import numpy as np

    from textlora.data import read_table, require_texts

    table = read_table(
        data,
        split="test",
        need_labels=False,
        **{name: value for name, value in columns.items() if value is not None},
    )
    require_texts(table)
    paired = table.columns.text_pair is not None
    classifier.require_pairs(paired, paired)
    picked = np.random.default_rng(seed).permutation(len(table.rows))[:limit]
    return [(table.rows[i].text, table.rows[i].text_pair) for i in picked]


@app.command()
@click.argument("merged")
@click.option(
    "--base", required=True, metavar="MODEL", help="Base model it was merged into: folder, hub id or minilm."
)
@_output
@click.option("--r", type=int, metavar="R", help="Largest rank. Default: what the spectrum shows.")
@json_option
def extract(merged: str, base: str, output: Path, r: int | None, as_json: bool) -> None:
    """Take the adapter out of a MERGED transformers folder again.

    textlora extract my-classifier --base minilm --output my-adapter
    """
    from textlora.transform.extract import extract

    result = extract(merged, base, output, r)
    if as_json:
        print_json(result)
        return
    width = max(map(len, result["layers"]))
    click.echo(f"{'layer':{width}}  rank   left over    rounding")
    for name, layer in result["layers"].items():
        click.echo(f"{name:{width}}  {layer['rank']:4}  {layer['residual']:10.2g}  {layer['rounding']:10.2g}")
    click.echo(
        f"rank {result['r']}; {result['residual']:.2g} of the difference left over, {result['rounding']:.2g} expected of {result['dtype']} rounding"
    )
    click.echo(f"largest logit difference from {merged} on the golden examples: {result['difference']:.2g}")
    click.echo(f"saved to {result['output']}")


@app.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@_output
@click.option(
    "--weights",
    type=CommaList(),
    metavar="W,W,...",
    help="Weight of each adapter. Default: equal, with sum 1.",
)
@click.option(
    "--combination",
    type=click.Choice(("linear", "svd", "ties", "dare")),
    default="linear",
    help="How.  [default: linear]",
)
@click.option(
    "--density",
    type=float,
    metavar="D",
    help="Share of entries that ties and dare keep.  [default: 0.2 and 0.5]",
)
@click.option(
    "--r", type=int, metavar="R", help="Rank of svd, ties and dare. Default: the largest of the adapters."
)
@click.option(
    "--seed", type=int, default=42, help="Seed of dare's choice and of --limit-eval rows.  [default: 42]"
)
@click.option("--data", metavar="DATA", help="Labelled rows to score each adapter and the combination on.")
@setting_options((*DATA_FLAGS, "limit_eval"))
@click.option(
    "--model",
    "base",
    metavar="MODEL",
    help="Base model: folder or hub id. Default: the one the first adapter names.",
)
@click.option("--device", default="auto", help="cpu, cuda, cuda:N, or auto.")
@json_option
def combine(
    folders: tuple[Path, ...], output: Path, weights: tuple[str, ...] | None, combination: str, data: str | None, limit_eval: int | None,
    as_json: bool, **flags: Any,
) -> None:  # fmt: skip
    """Combine adapters of one base to one: a weighted sum, its SVD, TIES or DARE.

    textlora combine a b --weights 0.7,0.3 --output both --data test.csv
    """
    columns = {name: flags.pop(name) for name in DATA_FLAGS}
    try:
        numbers = None if weights is None else [float(weight) for weight in weights]
    except ValueError as error:
        raise UsageError(
            f"--weights {','.join(weights or ())}: not numbers", "give one per adapter, such as 0.5,0.5"
        ) from error
    from textlora.inference.evaluate import read_rows
    from textlora.transform.combine import combine

    rows = (
        None
        if data is None
        else lambda classifier: read_rows(data, columns, classifier, limit_eval, flags["seed"])
    )
    result = combine(folders, output, numbers, combination, rows=rows, **flags)
    if as_json:
        print_json(result)
        return
    click.echo(
        f"{len(folders)} adapters to one of rank {result['r']} ({combination}); {result['residual']:.2g} of their difference cut off"
    )
    if result["scores"]:
        width = max(len(row["name"]) for row in result["scores"])
        click.echo(f"{'':{width}}  {result['metric']} on {result['scores'][0]['rows']} rows")
        for row in result["scores"]:
            value = row[result["metric"]]
            click.echo(
                f"{row['name']:{width}}  {'not defined here' if value is None else format(value, '.4f')}"
            )
    click.echo(f"saved to {result['output']}")
