"""Settings shared by all tests."""

import torch
from hypothesis import settings

torch.set_num_threads(1)  # one process per core runs the tests, and small tensors gain nothing from threads

settings.register_profile("discover", deadline=None)  # times vary on a shared machine
settings.load_profile("discover")
