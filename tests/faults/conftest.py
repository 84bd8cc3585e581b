from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.images import make_folder
from tests.faults.cases import Case, Cases
from tests.faults.nursery import Nursery


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether everything is asked for, `make faults`."""
    return bool(request.config.getoption("--faults") == "full")


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of eight images: three steps of eight are an epoch."""
    return make_folder(tmp_path_factory.mktemp("photos") / "all", each=8)


@pytest.fixture(scope="session")
def cases(nursery: Nursery, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return Cases(nursery, photos, tmp_path_factory.mktemp("whole"))


@pytest.fixture
def mae(cases: Cases) -> Case:
    return cases["mae"]
