"""How a program ends: a refusal is one line and exit code 2, Ctrl-C is 130, and a bug keeps its traceback."""

import linecache
import sys
import traceback

import torch
import typer

from ..heap import kept_pages

REFUSED, INTERRUPTED = 2, 130
KINDS = (ValueError, TypeError, NotImplementedError, ImportError)


def run_script(main):
    """Call the `main()` of a script or of the command and end the process as a user expects it.

    Numbers below 1.2e-38 count as zero meanwhile, where the CPU can: features of "exp" and "softmax" far below the
    largest are such, and products with them take a CPU several times as long. Free memory stays with the process, for
    the next forward.

    Args:
        main (`Callable`): takes no arguments. A `KeyboardInterrupt` that comes out of it may say how to go on.

    Raises:
        SystemExit: with 2 after a refusal, with 130 after Ctrl-C; what it said went to stderr.
    """
    torch.set_flush_denormal(True)
    try:
        with kept_pages():
            main()
    except KeyboardInterrupt as stopped:
        print(f"\n{stopped}" if str(stopped) else "\nstopped", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        if not is_refusal(error):
            raise
        typer.secho(f"error: {' '.join(str(error).split())}", fg=typer.colors.RED, err=True)
        raise SystemExit(REFUSED) from None
    finally:
        torch.set_flush_denormal(False)


def is_refusal(error):
    """Whether an error says what a user can mend: one of the system or the hub, or one that this project raises.

    The same kinds of errors come out of a bug, but not from a `raise` of ours.
    """
    if isinstance(error, OSError):
        return True
    if not isinstance(error, KINDS) or error.__traceback__ is None:
        return False
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    module = frame.f_globals.get("__name__", "")
    ours = module == "__main__" or module.split(".")[0] == "infini_hf"
    return ours and linecache.getline(frame.f_code.co_filename, line, frame.f_globals).lstrip().startswith("raise ")
