"""The run log: one JSON Lines file that says all a run has to say.

A run directory holds one ``log.jsonl``. Its first line is the header (what was run), then come
rows of kind ``step``, ``snapshot`` and ``eval`` as they happen, and one ``end`` row. The file is
strict JSON: a number that is not finite is written as ``null``. Every line is flushed, so a
killed run loses at most the line being written, and a reader forgives exactly that.

Nothing here imports torch: a log can be read on a machine that has never seen the model.
"""

from moebalance.runlog.columns import Rows, column
from moebalance.runlog.reading import Run, archive, find_runs, read_run
from moebalance.runlog.rows import FORMAT, KINDS, LOG_NAME, Row
from moebalance.runlog.writing import RunLog

__all__ = [
    "FORMAT",
    "KINDS",
    "LOG_NAME",
    "Row",
    "Rows",
    "Run",
    "RunLog",
    "archive",
    "column",
    "find_runs",
    "read_run",
]
