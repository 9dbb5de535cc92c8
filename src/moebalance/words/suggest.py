"""The end of an error about a name: the nearest one that exists, and all that are possible."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, possible: Iterable[str]) -> str:
    """The nearest possible name by spelling or by sound, or nothing.

    >>> did_you_mean("pyhton", ["python", "folder"]), did_you_mean("fi", ["none", "phi"])
    (" Did you mean 'python'?", " Did you mean 'phi'?")
    >>> did_you_mean("zzz", ["python"])
    ''
    """
    near = nearest(word, possible)
    return f" Did you mean {near!r}?" if near else ""


def nearest(word: str, possible: Iterable[str]) -> str | None:
    """The nearest possible name, or None.

    >>> nearest("tsalis", ["Tsallis", "Renyi"])
    'Tsallis'
    """
    by_sound = {_sound(name): name for name in possible}
    near = difflib.get_close_matches(_sound(word), by_sound, n=1)
    return by_sound[near[0]] if near else None


def instead_of(word: str, possible: Iterable[str]) -> str:
    """The nearest possible name, then all of them.

    >>> instead_of("Tsalis", ["Tsallis", "LpNorm"])
    " Did you mean 'Tsallis'? Possible: Tsallis, LpNorm."
    """
    names = list(possible)
    return f"{did_you_mean(word, names)} Possible: {', '.join(names) or 'none'}."


def check_options(owner: str, given: Iterable[str], possible: Iterable[str]) -> None:
    """Refuse an option that does not exist.

    Raises:
        ValueError: names the option, the nearest one and all of them.
    """
    known = list(possible)
    for key in given:
        if key not in known:
            raise ValueError(f"{owner} has no option {key!r}.{instead_of(key, known)}")


def _sound(name: str) -> str:
    return name.lower().replace("φ", "fi").replace("ph", "f").replace("_", "-")
