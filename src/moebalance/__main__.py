"""`python -m moebalance`: the command line."""

from moebalance.lab.cli import main

main()
