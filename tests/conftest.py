"""What all tests share: hypothesis draws the same examples every time, and a slow machine is no failure.

With `FMAQ_HYPOTHESIS=thorough` in the environment the tests of kernels draw many more, and other ones in every run;
`pytest --timeout 0` lets them take their time.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
settings.register_profile("thorough", deadline=None, database=None, print_blob=True)
settings.load_profile(os.environ.get("FMAQ_HYPOTHESIS", "deterministic"))


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The temporary folder of this run of the tests, which is that of all its processes."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own


@pytest.fixture(scope="session", autouse=True)
def own_cache(run_folder: Path) -> Iterator[None]:
    """Tests keep what they compile and synthesize in a folder of this run's, which is empty at first, and share it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMAQ_CACHE", str(run_folder / "cache"))
        yield
