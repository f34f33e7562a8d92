"""The command: ``grpo-fast``, and ``python -m grpo_fast``, which alone is ``grpo-fast demo``."""

import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Never

from . import _command, _demonstration
from ._advice import AdvisedError
from ._kernels.notices import is_compiling
from ._parser import parsed
from ._words import UsageError


def _identify(arguments: Any) -> tuple[str, int]:
    from .conformance.command import run  # which no other subcommand needs

    return run(arguments)


#: What each subcommand runs; it returns the last of what is printed, or the exit code, or both.
_RUN: dict[str, Callable[[Any], str | int | tuple[str, int]]] = {
    "evaluate": _command.run_evaluate,
    "sweep": _command.run_sweep,
    "worst": _command.run_worst,
    "compile": _command.run_compile,
    "identify": _identify,
    "demo": _demonstration.run,
}
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command of these arguments, or the process's, print what it finds, and return the exit code.

    It is 2 for bad input, 130 after Ctrl-C, and 1 if the kernels and the reference disagree in the demonstration.

    Raises
    ------
    SystemExit
        The arguments cannot be right (2), or ask for help or the version (0).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # where it is ASCII; better a "?" than none of the text
    code = 0
    try:
        arguments = parsed(sys.argv[1:] if argv is None else argv)
        if arguments is None:
            return 0
        result = _RUN[arguments.subcommand](arguments)
        if isinstance(result, int):
            return result
        text, code = result if isinstance(result, tuple) else (result, 0)
        print(text, flush=True)
    except BrokenPipeError:  # whoever reads has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("grpo-fast: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except (OSError, ImportError, MemoryError, RuntimeError, TypeError, ValueError, UsageError) as error:
        message = error.in_shell() if isinstance(error, AdvisedError) else str(error)
        print(f"grpo-fast: error: {' '.join(message.split())}", file=sys.stderr)  # pyarrow's may have many lines
        return 2
    return code


def command() -> Never:
    """Run the process's command and end the process, which after Ctrl-C does not wait for what is being compiled."""
    code = main()
    if code == _INTERRUPTED and is_compiling():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    alone = len(sys.argv) == 1 or (sys.argv[1].startswith("-") and sys.argv[1] not in ("-h", "--help", "--version"))
    if alone and not set(_RUN) & set(sys.argv[1:]):
        sys.argv.insert(1, "demo")
    command()
