"""Turn states into distributions over actions, and learn them: distributions, losses, replay and averaging.

The modules of this package are general: they know tensors of log-probabilities and rewards, not what is being built.
"""
