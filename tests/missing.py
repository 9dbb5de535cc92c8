"""A package that looks not installed, for the errors that say what to install."""

from __future__ import annotations

import importlib


def hide(monkeypatch, package: str) -> None:
    """Make a package look not installed to code that imports it lazily."""
    found = importlib.import_module

    def missing(name: str) -> object:
        if name == package:
            raise ModuleNotFoundError(name)
        return found(name)

    monkeypatch.setattr("importlib.import_module", missing)
