"""Evidence: each claim of the paper as recipes, thinned run logs, a figure and a plain verdict.

    recipes/evidence/*.toml ──compare──▶ run logs ──results──▶ benchmarks/results/evidence/*.jsonl
                                                                    │
                                       docs/evidence.md ◀──page── chapters/*.py

A chapter reads committed results and nothing else, so the page can be made again, and checked,
without training anything.
"""

from moebalance.evidence.command import keep as keep
from moebalance.evidence.page import write_page as write_page
