"""One thread a process, and one profile for all property tests."""

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("moebalance", deadline=None, derandomize=True)
hypothesis.settings.load_profile("moebalance")
