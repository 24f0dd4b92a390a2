"""Tasks by the names they have on the command line."""

from .needle_tasks import NamedTask, PasskeyTask
from .ruler_tasks import KINDS, RulerTask

RULER = tuple(f"ruler-{kind}" for kind in KINDS)
TASKS = ("passkey", "named", *RULER)


def make_task(name, needles=None, digits=5, keys=None, values=None):
    """The task of a name; an option that it does not take is refused.

    Args:
        name (`str`): of `TASKS`.
        needles (`int`, *optional*): needles in a stream; by default those of the task.
        digits (`int`, *optional*, defaults to `5`): digits of a key or number.
        keys (`str`, *optional*): of RULER's tasks, `"words"` (default) or `"uuids"`.
        values (`str`, *optional*): of RULER's tasks, `"numbers"` (default), `"words"` or `"uuids"`.

    Raises:
        ValueError: for an unknown name, or an option that the task does not take.
    """
    if name not in TASKS:
        raise ValueError(f"task={name!r}: must be one of {', '.join(map(repr, TASKS))}")
    if name in RULER:
        return RulerTask(name.removeprefix("ruler-"), needles, keys or "words", values or "numbers", digits)
    for option, value in (("keys", keys), ("values", values)):
        if value is not None:
            raise ValueError(
                f"{option}={value!r}: the task {name!r} has none to choose; take one of {', '.join(RULER)}"
            )
    if name == "named":
        return NamedTask(8 if needles is None else needles, digits)
    if needles not in (None, 1):
        raise ValueError(f"needles={needles}: the passkey of the benchmark is alone; take the task 'named'")
    return PasskeyTask(digits)
