"""What can be wrong with the description of a space of crystals."""


class RestrictionError(ValueError):
    """A restriction is malformed, contradicts another one, or leaves nothing."""


class RepresentationError(ValueError):
    """A crystal that the environment cannot build."""


class SpaceSizeError(ValueError):
    """A space of crystals that is too large to be listed."""
