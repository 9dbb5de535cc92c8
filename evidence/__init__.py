"""Evidence: each claim of the paper as recipes, thinned run logs, a figure and a plain verdict.

    evidence/recipes/*.toml ──compare──▶ run logs ──results──▶ evidence/results/*.jsonl
                                                                    │
                                       docs/evidence.md ◀──page── chapters/*.py

A chapter reads committed results and nothing else, so the page can be made again, and checked,
without training anything.
"""

from evidence.command import keep as keep
from evidence.page import write_page as write_page
