"""The cost of balancing on this machine, next to a bare router and to rivals, in one run.

    cost of a variant = median over rounds of  time(variant) / time(bare router),

all variants once a round, in an order drawn anew, so that drift and neighbours hit all alike; a
second bare router among them is the null control: what it shows beyond 1 is noise. Kernels, bytes
moved and bytes kept for backward are counted as well, and those are the same on every machine.
"""

from moebalance.lab.bench.page import table, write_page
from moebalance.lab.bench.router import Case, measure_routers
from moebalance.lab.bench.step import StepCase, measure_steps
from moebalance.lab.bench.timing import describe_machine
from moebalance.lab.bench.variants import RULES, Rule

__all__ = [
    "RULES",
    "Case",
    "Rule",
    "StepCase",
    "describe_machine",
    "measure_routers",
    "measure_steps",
    "table",
    "write_page",
]
