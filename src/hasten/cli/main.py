"""The command `hasten`: reads the command line, runs a verb, turns errors into exit codes.

    argv --section keys to --set--> typer --> verb --> result on stdout, messages on stderr
                                                   `-> error: one or two lines, an exit code

Nothing heavy is imported before a verb needs it: `hasten --help` loads neither torch nor numpy.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import typer
from typer.core import TyperCommand

from hasten.cli import augment, convert, demo, evaluate, export, inspect, predict, train
from hasten.cli.console import say
from hasten.cli.settings import show_all_keys
from hasten.core.errors import DivergenceError, HastenError, UsageError, nearest
from hasten.parallel.heartbeat import tell_launcher
from hasten.parallel.place import find_place

_KEY = re.compile(r"--(?P<key>[a-z]+\.[a-z0-9_-]+)(?:=(?P<value>.*))?", re.DOTALL | re.IGNORECASE)
_TYPE = re.compile(r" <.+>$")


class _Verb(TyperCommand):
    """A command whose help has words, FILE or COLUMN, where typer writes types of Python's."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Returns what follows the command's name: RUN has to be given, [FILE] may be."""
        return ["[OPTIONS]", *(_usage(p) for p in self.params if p.param_type_name == "argument")]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the help of the arguments, then that of the options."""
        for title, kind in (("Arguments", "argument"), ("Options", "option")):
            parameters = [p for p in self.get_params(ctx) if p.param_type_name == kind]
            rows = [(p, row) for p in parameters if (row := p.get_help_record(ctx))]
            if rows:
                with formatter.section(title):
                    formatter.write_dl([(_written(p, name), text) for p, (name, text) in rows])


def _usage(argument: Any) -> str:
    if argument.metavar:
        return argument.metavar
    word = argument.name.upper() + "..." * (argument.nargs != 1)
    return word if argument.required else f"[{word}]"


def _written(parameter: Any, name: str) -> str:
    """Returns how a parameter is written: RUN, or --text-column COLUMN."""
    if parameter.param_type_name == "argument":
        return parameter.metavar or parameter.name.upper()
    return _TYPE.sub(f" {parameter.name.rpartition('_')[2].upper()}", name)


app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="From a file of examples to a trained, tested, usable Transformer.",
    epilog="With any command, --debug shows the traceback of an error.",
)
for _name, _function, _help in (
    ("demo", demo.demo, "The whole way on real data that is already here."),
    ("inspect", inspect.inspect, "Show what a file holds, before any training."),
    ("train", train.train, "Train and test a model on a file of examples."),
    ("evaluate", evaluate.evaluate, "Measure a run on a file of examples."),
    ("predict", predict.predict, "Use a run on texts, or on the rows of a file."),
    ("augment", augment.augment, "Make more training pairs for a translation."),
    ("convert", convert.convert, "Turn pickled weights into safetensors."),
    ("export", export.export, "Write a run for transformers or as ONNX."),
):
    app.command(_name, cls=_Verb, short_help=_help)(_function)


class Stopped(BaseException):
    """A signal arrived; not a KeyboardInterrupt, which typer would end without a word."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and stop."),
    help_all: bool = typer.Option(
        False, "--help-all", is_eager=True, callback=show_all_keys, help="List every key and stop."
    ),
) -> None:
    if version:
        from hasten import __version__

        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(argv: list[str] | None = None) -> None:
    """Runs the command and ends the process with its exit code."""
    arguments, debug = _without_debug(list(sys.argv[1:] if argv is None else argv))
    try:
        with _stoppable():
            code = app(args=set_flags(arguments), standalone_mode=False, prog_name="hasten")
            sys.stdout.flush()
    except BaseException as error:
        if debug and not isinstance(error, SystemExit | KeyboardInterrupt | Stopped):
            traceback.print_exc()
        code = _exit_code(error)
    sys.exit(code if isinstance(code, int) else 0)


def _without_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """Takes `--debug` out, which every verb has; what follows `--` is text."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    kept = [argument for argument in arguments[:end] if argument != "--debug"]
    return kept + arguments[end:], len(kept) < end


@contextmanager
def _stoppable() -> Iterator[None]:
    """Raises ``Stopped`` on Ctrl-C and SIGTERM, so that nothing half-written stays behind."""
    arrived: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        arrived.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        # While torch sets itself up, its C++ calls Python and ends the process on an exception.
        spec = getattr(sys.modules.get("torch"), "__spec__", None)
        if getattr(spec, "_initializing", False):
            stop_soon(number)
        else:
            raise Stopped(number)

    def stop_soon(number: int) -> None:
        signal.signal(signal.SIGALRM, lambda *_: stop(number, None))
        signal.setitimer(signal.ITIMER_REAL, 0.01)

    def again(unraisable: Any) -> None:
        # Raised inside a callback whose errors Python ignores, and imports run many of them.
        stopped = unraisable.exc_value
        if not isinstance(stopped, Stopped):
            old_hook(unraisable)
            return
        stop_soon(stopped.signal_number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [
        number
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is not signal.SIG_IGN  # nohup, or a shell's background
    ]
    old = [signal.signal(number, stop) for number in numbers]
    old_hook, sys.unraisablehook = sys.unraisablehook, again
    try:
        yield
    except Exception as error:
        # Modules written in C may put an ImportError in its place. What is meant for a person
        # stands: why the state could not be saved, say.
        if not arrived or isinstance(error, HastenError | OSError):
            raise
        raise Stopped(arrived[0]) from error
    finally:
        sys.unraisablehook = old_hook
        for number, handler in zip(numbers, old, strict=True):
            signal.signal(number, handler)


def set_flags(arguments: list[str]) -> list[str]:
    """Rewrites `--section.key value` into `--set section.key=value`, which typer can read.

    Raises:
        UsageError: a key without a value.
    """
    rewritten: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":  # what follows is text
            return [*rewritten, argument, *rest]
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
    if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):
        _silence_output()  # the reader has gone, as `| head` does
        return 0
    rank = _rank()
    signal_number = getattr(error, "signal_number", None)
    if rank and (signal_number or isinstance(error, DivergenceError)):
        # Signals and diverging losses are agreed on by all processes; rank 0 speaks for them.
        return 128 + signal_number if signal_number else DivergenceError.exit_code
    of_rank = f"rank {rank}: " if rank and not str(error).startswith("rank ") else ""
    if isinstance(error, HastenError):
        return _say(f"{of_rank}{error}", error.exit_code)
    if isinstance(error, typer.Exit):
        return error.exit_code
    if signal_number:
        return _say(_stop_message(error), 128 + signal_number)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return _say("stopped.", 130)
    if hasattr(error, "format_message"):
        return _say(_usage_message(error), UsageError.exit_code)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, OSError):
        _silence_output()  # what could not be written would fail again at the end
        where = f"{error.filename}: " if error.filename else ""
        return _say(f"{of_rank}{where}{error.strerror or error}.", 8)
    what = f"{type(error).__name__}: {error}"
    tell_launcher(what)
    return _say(f"{of_rank}{what}\nThis is a defect of hasten; --debug shows where.", 1)


def _rank() -> int:
    """Returns the number of this process among those that were started together."""
    try:
        place = find_place()
    except UsageError:
        return 0
    return 0 if place is None else place.rank


def _stop_message(error: BaseException) -> str:
    """Says how to go on, where there is something to go on with."""
    folder = getattr(error, "folder", None)
    if folder is None:
        return "stopped; nothing half-done is kept."
    return f"stopped; go on with: hasten train --resume {shlex.quote(str(folder))}"


def _usage_message(error: Any) -> str:
    """Names the nearest option or command in place of typer's own wording."""
    context = getattr(error, "ctx", None)
    command = getattr(context, "command", None)
    message, hint = error.format_message(), ""
    if name := getattr(error, "option_name", None):
        message = getattr(error, "message", message)
        if name == "--set" and context is not None:
            return f"{context.command_path} takes no settings such as --train.epochs; train does."
        hint = nearest(name, [o for p in getattr(command, "params", []) for o in p.opts])
    elif message.startswith("No such command"):
        message = message.partition(" Did you mean")[0]
        hint = nearest(message.split("'")[1], getattr(command, "commands", ()))
    elif problems := getattr(error.__cause__, "errors", None):  # options are numbers or texts
        (problem,) = problems()
        kind = "a whole number" if problem["type"].startswith("int") else "a number"
        message = f"{error.param.opts[0]}: {problem['input']!r} does not fit: it should be {kind}"
    if context is not None and not hint:
        hint = f" See: {context.command_path} --help"
    if name and not name.startswith("--") and getattr(command, "name", None) == "predict":
        hint = " Put -- before a text that begins with a dash."
    return f"{message.rstrip('.')}.{hint}"


def _say(message: str, code: int) -> int:
    say(f"hasten: {message}")
    return code


def _silence_output() -> None:
    sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
