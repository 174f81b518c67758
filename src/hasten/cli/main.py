"""The command `hasten`: reads the command line, runs a verb, turns errors into exit codes.

    argv --section keys to --set--> typer --> verb --> result on stdout, messages on stderr
                                                   `-> error: one or two lines, an exit code

Nothing heavy is imported before a verb needs it: `hasten --help` loads neither torch nor numpy.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from typing import Any

import typer

from hasten.cli import demo, evaluate, inspect, predict, train
from hasten.core.errors import HastenError, UsageError, nearest

_KEY = re.compile(r"--(?P<key>[a-z]+\.[a-z0-9_]+)(?:=(?P<value>.*))?", re.DOTALL)

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="From a file of examples to a trained, tested, usable Transformer.",
)
app.command("demo")(demo.demo)
app.command("inspect")(inspect.inspect)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("predict")(predict.predict)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and stop."),
) -> None:
    if version:
        from hasten import __version__

        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(argv: list[str] | None = None) -> None:
    """Runs the command and ends the process with its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        code = app(args=set_flags(arguments), standalone_mode=False, prog_name="hasten")
    except BaseException as error:
        if debug and not isinstance(error, SystemExit | KeyboardInterrupt):
            traceback.print_exc()
        code = _exit_code(error)
    _flush()
    sys.exit(code if isinstance(code, int) else 0)


def set_flags(arguments: list[str]) -> list[str]:
    """Rewrites `--section.key value` into `--set section.key=value`, which typer can read.

    Raises:
        UsageError: a key without a value.
    """
    rewritten: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        match = _KEY.fullmatch(argument)
        if match is None:
            rewritten.append(argument)
            continue
        value = match["value"]
        if value is None:
            value = next(rest, None)
        if value is None:
            raise UsageError(f"{argument} needs a value.")
        rewritten += ["--set", f"{match['key']}={value}"]
    return rewritten


def _exit_code(error: BaseException) -> int:
    """Prints an error for a person and returns its exit code."""
    if isinstance(error, HastenError):
        return _say(str(error), error.exit_code)
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return _say("stopped before the first checkpoint; nothing is kept.", 130)
    if isinstance(error, BrokenPipeError):
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - the reader has gone
        return 0
    if signal_number := getattr(error, "signal_number", None):
        return 128 + signal_number  # the verb has said how to go on
    if hasattr(error, "format_message"):
        return _say(_usage_message(error), UsageError.exit_code)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return _say(f"{where}{error.strerror or error}.", 8)
    _say(f"{type(error).__name__}: {error}\nThis is a defect of hasten; --debug shows where.", 1)
    return 1


def _usage_message(error: Any) -> str:
    """Adds the nearest option to typer's message about one that does not exist."""
    message = error.format_message().rstrip(".") + "."
    name = getattr(error, "option_name", None)
    if name and "Did you mean" not in message and getattr(error, "ctx", None) is not None:
        options = [o for p in error.ctx.command.params for o in getattr(p, "opts", [])]
        message += nearest(name, options)
    return message


def _say(message: str, code: int) -> int:
    print(f"hasten: {message}", file=sys.stderr)
    return code


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
