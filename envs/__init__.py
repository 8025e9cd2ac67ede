"""Build crystals step by step: facts of crystallography and chemistry, exact masks, forward steps.

Nothing here knows of proxies, policies or rewards. `envs.crystal` is the record of finished crystals that all packages
exchange, `envs.restrictions` says which crystals a space holds, and `envs.symmetry` has the facts of the 230 groups.
"""
