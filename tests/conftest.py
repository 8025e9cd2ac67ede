"""Settings shared by all tests."""

from hypothesis import settings

settings.register_profile("discover", deadline=None)  # times vary on a shared machine
settings.load_profile("discover")
