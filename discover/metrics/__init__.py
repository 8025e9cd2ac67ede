"""Published figures of structure prediction and generation: one function each, with protocol and source.

This is the only place that computes them. A failure (a None, a time-out) stays in every denominator.
"""
