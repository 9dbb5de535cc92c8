"""Which release of Megatron-Core is tested: the installed one, or that in the folder MEGATRON."""

import os
import sys

if "MEGATRON" in os.environ:
    # First, and before anything imports the installed one. Processes that tests start inherit it.
    sys.path.insert(0, os.environ["MEGATRON"])
