"""What other tools write about routing, read as runs: for the report and the doctor.

    load.py       counts of a layer; loads of steps → a run
    megatron.py   Megatron-Core's router traces, `router_trace_rank*.jsonl`
    sidecars.py   what lies next to such a trace: logits, and the dumped routers
    rollouts.py   `routed_experts` of rollouts, as vLLM, SGLang and RL trainers give them
    logits.py     Transformers' `output_router_logits`, saved
    find.py       which of them a file is

A trace knows loads. It knows no loss, and often not how many experts there are.
"""

from moebalance.lab.traces.find import Traces, find_traces, is_trace
from moebalance.lab.traces.load import Missing

__all__ = ["Missing", "Traces", "find_traces", "is_trace"]
