"""What all tests share: hypothesis draws the same examples every time, and a slow machine is no failure.

With `FMAQ_HYPOTHESIS=thorough` in the environment the tests of kernels draw many more, and other ones in every run;
`pytest --timeout 0` lets them take their time.
"""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
settings.register_profile("thorough", deadline=None, database=None, print_blob=True)
settings.load_profile(os.environ.get("FMAQ_HYPOTHESIS", "deterministic"))


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A module's tests keep what they synthesize in a folder of their own, which is empty at first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMAQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
