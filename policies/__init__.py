"""Turn states into distributions over actions, and learn them: distributions, losses, replay and averaging.

Distributions, losses, replay, averaging and processes are general: they know tensors of log-probabilities and rewards,
not what is being built. The policy, its roll-outs and the priors know crystals.
"""
