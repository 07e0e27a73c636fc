"""`textlora push`: a finished adapter folder to the hub."""

import sys
from pathlib import Path

import click

from textlora.cli.base import app, json_option, print_json


@app.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repo_id")
@click.option("--private", is_flag=True, help="Make a private repository.")
@click.option(
    "--revision", metavar="REV", help="Branch to commit to; made where it is not there.  [default: main]"
)
@click.option("--message", metavar="TEXT", help="Message of the commit.")
@json_option
def push(
    folder: Path, repo_id: str, private: bool, revision: str | None, message: str | None, as_json: bool
) -> None:
    """Upload a finished adapter folder to REPO_ID (owner/name), without run/.

    textlora push my-adapter me/my-adapter --private
    """
    from textlora.adapters.hub import push_adapter

    done = push_adapter(folder, repo_id, private=private, revision=revision, message=message)
    for note in done["notes"]:
        print(f"textlora: {note}", file=sys.stderr)
    if as_json:
        print_json(done)
    else:
        click.echo(
            f"pushed {len(done['files'])} files, {done['bytes']:,} bytes, to {done['url']} (commit {done['commit'][:12]})"
        )
