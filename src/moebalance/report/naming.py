"""What settings of one method are called: what differs is named, what is common is said once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from moebalance.report.methods import display_name
from moebalance.report.parts import parts_of
from moebalance.runlog import Run

Key = tuple[str, str]
"""A method's word and its `repr`: one setting of a method."""


@dataclass(frozen=True)
class Name:
    """What one setting is called among the others.

    Attributes:
        method: the method's name in words.
        own: what tells this setting from the others of the method; empty for the only one.
        common: what all settings of the method share; empty for the only one.
    """

    method: str
    own: str = ""
    common: str = ""

    def __str__(self) -> str:
        return f"{self.method} · {self.own}" if self.own else self.method


def by_setting(runs: Iterable[Run]) -> dict[Key, list[Run]]:
    """Runs that share method and hyper-parameters."""
    groups: dict[Key, list[Run]] = {}
    for run in runs:
        groups.setdefault((run.method, run.method_repr), []).append(run)
    return groups


def names(groups: Mapping[Key, Sequence[Run]]) -> dict[Key, Name]:
    """The name of every setting, in the order given."""
    known = {key: settings_of(runs[0]) for key, runs in groups.items()}
    return {key: _name(key, {k: v for k, v in known.items() if k[0] == key[0]}) for key in groups}


def settings_of(run: Run) -> dict[str, str]:
    """The settings of a run's method in words; of two parts that share a name, with the part's."""
    parts = parts_of(run)
    shared = Counter(name for part in parts for name in part.settings)
    return {
        f"{part.word} {name}" if shared[name] > 1 else name: str(value).removesuffix("()")
        for part in parts
        for name, value in part.settings.items()
    }


def _name(key: Key, rivals: Mapping[Key, Mapping[str, str]]) -> Name:
    if len(rivals) == 1:
        return Name(display_name(key[0]))
    mine = rivals[key]
    own: list[str] = []
    common: list[str] = []
    for setting in dict.fromkeys(name for settings in rivals.values() for name in settings):
        words = f"{setting}={value}" if (value := mine.get(setting)) else f"no {setting}"
        differs = len({settings.get(setting) for settings in rivals.values()}) > 1
        (own if differs else common).append(words)
    numbered = f"setting {list(rivals).index(key) + 1}"
    return Name(display_name(key[0]), ", ".join(own) or numbered, ", ".join(common))
