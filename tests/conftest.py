from collections.abc import Iterator

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make faults` breaks everything there is (`tests/faults`), every other run a sample."""
    parser.addoption("--faults", choices=("sample", "full"), default="sample")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: only with --faults full")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--faults") != "full":
        items[:] = [item for item in items if not item.get_closest_marker("full")]


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or fills the user's cache of file lists."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIMLET_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
