"""Errors of the sampling and training core, each named after the thing that is wrong."""


class DeadEndError(ValueError):
    """A state has no legal action, or a condition leaves none."""


class IntervalError(ValueError):
    """An interval holds no number strictly between its ends."""


class BatchShapeError(ValueError):
    """Tensors that must describe the same rows do not."""


class ReplayError(ValueError):
    """A replay buffer is asked for what it does not hold, or offered what it cannot hold."""


class CheckpointError(ValueError):
    """Saved tensors do not fit the object that should load them."""


class ProcessError(ValueError):
    """A process of a training that has ended before the others, or never came."""
