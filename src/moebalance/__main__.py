"""`python -m moebalance`: the command line."""

from moebalance.cli import main

main()
