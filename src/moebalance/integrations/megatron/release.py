"""Which releases of Megatron-Core these routers are written for and tested on."""

import os

from megatron.core import __version__  # type: ignore[import-not-found]

KNOWN = ("0.16", "0.17", "0.18", "0.19")
"""Releases whose routers were read, and on which all tests of this integration run."""

_OVERRIDE = "MOEBALANCE_MEGATRON"


def check_release(version: str = __version__) -> None:
    """Refuse a Megatron-Core whose routers nobody here has read.

    A router that was changed between releases can drop the balancing term without an error.

    Raises:
        ImportError: says which releases are known, and how to try another one.
    """
    release = ".".join(version.split(".")[:2])
    if release in (*KNOWN, os.environ.get(_OVERRIDE)):
        return
    raise ImportError(
        f"megatron-core {version} is not known to this release of moebalance, which is tested on "
        f"{', '.join(KNOWN)}. Install one of these, or a newer moebalance. To try {release} as it "
        f"is, set the environment variable {_OVERRIDE}={release}, and first compare one step's "
        "router gradient under SwitchLoss with that of Megatron's aux_loss."
    )
