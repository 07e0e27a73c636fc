"""The `textlora` command: parse, call one job, show progress, print. Heavy modules are imported when a
command runs."""

import sys
import traceback

import click

from textlora.cli import change, compare, convert, export, hub, serve, train, tune, use  # noqa: F401  each adds its commands to `app`
from textlora.cli.base import app
from textlora.core.errors import StorageError, TextloraError

__all__ = ["app", "main", "run"]


def main() -> None:
    """Entry point: exit code 0 done, 2 wrong usage or bad input, 130 interrupted, 1 anything else."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; errors become one line on standard error and an exit code."""
    try:
        return app.main(arguments, prog_name="textlora", standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help())
        return 2
    except click.ClickException as error:
        return _fail(" ".join(error.format_message().split()), 2)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", 130)
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except TextloraError as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:
        trouble = StorageError(
            f"{error.filename or 'a file'}: {error.strerror or error}", "check the path and the free space"
        )
        return _fail(str(trouble), trouble.exit_code)
    except Exception as error:  # a bug: show all of it
        traceback.print_exc()
        return _fail(f"internal error: {error}; please report it with the lines above", 1)


def _fail(message: str, code: int) -> int:
    print(f"textlora: {message}", file=sys.stderr)
    return code
