from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or fills the user's cache of file lists."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIMLET_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
