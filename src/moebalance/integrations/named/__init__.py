"""Balance any model whose routers are modules that return logits, such as an `nn.Linear`.

finding.py   what the user names, and what is refused
places.py    where logits come by: a module, a method, a use of a parameter
surround.py  padding and sequences, read from the call of the model
hooks.py     after each call of a router: choose, count and charge
evidence.py  what the first gradient tells of a wrong `top_k` or gate
"""

from moebalance.integrations.named.finding import Named, Routers, Rule, find, rule, suggestion
from moebalance.integrations.named.hooks import attach

__all__ = ["Named", "Routers", "Rule", "attach", "find", "rule", "suggestion"]
