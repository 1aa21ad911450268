"""What all tests share: hypothesis draws the same examples every time, and a slow machine is no failure."""

from hypothesis import settings

settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
settings.load_profile("deterministic")
