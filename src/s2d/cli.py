"""The command line: commands, messages, exit codes. Nothing is computed here.

Heavy libraries are imported inside the commands, so that help is there at once.
"""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from s2d.distributed import processes

# Importing a command registers it; in the order of the help.
from s2d.commands import runs  # isort: skip
from s2d.commands import audit, condition, quantize, evaluate, export, bench, report, recipes, doctor  # isort: skip
from s2d.commands.shared import app
from s2d.errors import InputError, first_line, visible

COMMANDS = (runs, audit, condition, quantize, evaluate, export, bench, report, recipes, doctor)

_INTERRUPTED = 130  # the shell's code for Ctrl-C

# Failures of the disk and of permissions: the user settles them; they are no defect of s2d.
_THEIRS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


@app.callback(
    invoke_without_command=True,
    help="Selective Spectral Decay: audit, fine-tune, quantize and export transformers for 4 bits.\n\n"
    "audit lists the weights that make outliers, condition fine-tunes them away, quantize rounds to low bits, "
    "evaluate scores the result, and run does all of it by a recipe.",
    epilog="Each command explains itself: s2d audit --help",
)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """What ``s2d`` does without a command."""
    if version:
        from s2d import __version__

        print(f"s2d {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Words after ``s2d``; those of the process by default.

    Returns:
        0 done, 1 failed by our fault, 2 bad input, 130 interrupted. What went wrong is one line on standard error.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.showwarning = _show_warning
    usage_error: type[Exception] = typer.BadParameter.__mro__[1]  # click's, wherever this typer keeps it
    try:
        code = app(list(arguments) if arguments is not None else None, prog_name="s2d", standalone_mode=False)
        sys.stdout.flush()
        if code == _INTERRUPTED:  # newer typers turn Ctrl-C into an exit code themselves
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except InputError as error:
        return _fail(str(error), 2)
    except usage_error as error:
        command = getattr(getattr(error, "ctx", None), "command_path", "s2d")
        return _fail(f"{error.format_message().rstrip('.?')}; see {command} --help", 2)  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        return _fail(f"interrupted; what is done is kept. To continue: {_again(arguments)}", _INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # who read us has gone, as in s2d ... | head
        return 0
    except Exception as error:
        return _unexpected(error)


def _unexpected(error: Exception) -> int:
    if isinstance(error, OSError) and error.errno in _THEIRS:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror}; free some space or choose another place", 2)
    text = first_line(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return _fail("not enough memory; use smaller batches (-o train.batch_size=16 -o batch_size=16)", 2)
    if processes.lost_another(error):
        return _fail(
            "another process of this run ended, and its own last line says why; run again to continue, or have "
            "torchrun do so: --max-restarts 3",
            1,
        )
    handle, place = tempfile.mkstemp(prefix="s2d-", suffix=".txt")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        traceback.print_exception(error, file=file)
    return _fail(f"this is a defect of s2d: {type(error).__name__}: {text}; the traceback is in {place}", 1)


def _fail(text: str, code: int) -> int:
    print(f"s2d: {visible(' '.join(text.split()), 1500)}", file=sys.stderr)
    return code


def _again(arguments: Sequence[str] | None) -> str:
    import shlex

    return shlex.join(["s2d", *(sys.argv[1:] if arguments is None else arguments)])


def _show_warning(message: Warning | str, category: type[Warning], filename: str, *_: Any) -> None:
    """Warnings of s2d as one line each; those that libraries address to developers are left out."""
    if issubclass(category, UserWarning) and f"{os.sep}s2d{os.sep}" in filename:
        print(f"s2d: note: {visible(' '.join(str(message).split()), 1500)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
