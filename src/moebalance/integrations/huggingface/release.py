"""Which releases of Transformers these hooks fit, and what to say under an older one."""

import transformers
from packaging.version import Version

FIRST, WHOLE = Version("5.0"), Version("5.23")
"""The first release that is served at all; the first under which every family of the docs is."""


def check(installed: str = transformers.__version__) -> None:
    """Refuse a release whose models have other parts.

    Raises:
        ImportError: it is older than `FIRST`.
    """
    if Version(installed) < FIRST:
        raise ImportError(
            f"Transformers {installed} is installed, and moebalance needs {FIRST} or newer: "
            f"pip install 'transformers>={WHOLE}'."
        )


def hint(installed: str = transformers.__version__) -> str:
    """What to add to a refusal of a router, if a newer release may have one that is known.

    >>> hint("5.24.0")
    ''
    """
    if Version(installed) >= WHOLE:
        return ""
    return (
        f" Transformers {installed} is installed, and many families have got such routers since: "
        f"take transformers>={WHOLE}, under which all families that moebalance lists are balanced."
    )


check()
