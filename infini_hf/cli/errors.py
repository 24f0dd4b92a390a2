"""How a program ends: a refusal is one line and exit code 2, Ctrl-C is 130, and a bug keeps its traceback."""

import dis
import sys

REFUSED, INTERRUPTED = 2, 130
KINDS = (ValueError, TypeError, NotImplementedError, ImportError)
RAISE = dis.opmap["RAISE_VARARGS"]


def run_script(main):
    """Call a script's `main()` and end the process as a user expects it.

    Args:
        main (`Callable`): takes no arguments. A `KeyboardInterrupt` that comes out of it may say how to go on.

    Raises:
        SystemExit: with 2 after a refusal, with 130 after Ctrl-C; what it said went to stderr.
    """
    try:
        main()
    except KeyboardInterrupt as stopped:
        print(f"\n{stopped}" if str(stopped) else "\nstopped", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        if not is_refusal(error):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(REFUSED) from None


def is_refusal(error):
    """Whether an error says what a user can mend: one of the system or the hub, or one that this project raises.

    The same kinds of errors come out of a bug, but not from a `raise` of ours.
    """
    if isinstance(error, OSError):
        return True
    if not isinstance(error, KINDS) or error.__traceback__ is None:
        return False
    place = error.__traceback__
    while place.tb_next is not None:
        place = place.tb_next
    module = place.tb_frame.f_globals.get("__name__", "")
    ours = module == "__main__" or module.split(".")[0] == "infini_hf"
    return ours and place.tb_frame.f_code.co_code[place.tb_lasti] == RAISE


def one_line(error):
    """What an error says, its lines joined."""
    return " ".join(str(error).split())
