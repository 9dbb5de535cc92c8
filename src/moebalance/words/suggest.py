"""The nearest name to a mistyped one, for the end of an error message."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, possible: Iterable[str]) -> str:
    """End of an error message: the nearest possible name, or nothing.

    >>> did_you_mean("pyhton", ["python", "folder"])
    " Did you mean 'python'?"
    >>> did_you_mean("zzz", ["python"])
    ''
    """
    near = difflib.get_close_matches(word, list(possible), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
