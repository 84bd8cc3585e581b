from pathlib import Path

import numpy as np
import pytest

from mimlet.data.subset import choose
from mimlet.errors import ConfigError, DataError

BALANCED = np.repeat(np.arange(10), 200)
UNEQUAL = np.repeat([0, 1, 2], [3, 50, 947])


def counts(labels: np.ndarray, spec: str, seed: int = 0) -> list[int]:
    chosen = choose(labels, spec, seed, [])
    assert chosen.dtype == np.int64
    assert (np.diff(chosen) > 0).all()
    return [int(n) for n in np.bincount(labels[chosen], minlength=labels.max() + 1)]


def test_all() -> None:
    assert choose(BALANCED, "", 0, []).tolist() == list(range(2000))
    assert choose(BALANCED, "100%", 0, []).tolist() == list(range(2000))


def test_share_is_balanced() -> None:
    assert counts(BALANCED, "1%") == [2] * 10
    assert counts(BALANCED, "10%") == [20] * 10
    assert counts(BALANCED, "0.1%") == [1] * 10
    assert counts(UNEQUAL, "10%") == [3, 48, 49] or counts(UNEQUAL, "10%") == [3, 49, 48]
    assert counts(UNEQUAL, "50%") == [3, 50, 447]


@pytest.mark.parametrize("labels", [BALANCED, UNEQUAL, np.full(1000, -1)])
def test_smaller_lies_in_larger(labels: np.ndarray) -> None:
    previous: set[int] = set()
    for spec in ("1%", "2.5%", "10%", "60%"):
        now = set(choose(labels, spec, 3, []).tolist())
        assert previous < now
        previous = now
    assert set(choose(labels, "2", 3, [])) < set(choose(labels, "5", 3, []))


def test_seed() -> None:
    assert choose(BALANCED, "10%", 1, []).tolist() == choose(BALANCED, "10%", 1, []).tolist()
    assert choose(BALANCED, "10%", 1, []).tolist() != choose(BALANCED, "10%", 2, []).tolist()


def test_without_labels_it_is_a_random_part() -> None:
    chosen = choose(np.full(10_000, -1), "10%", 0, [])
    assert len(chosen) == 1000
    assert 4000 < chosen.mean() < 6000


def test_number_per_class() -> None:
    assert counts(BALANCED, "25") == [25] * 10
    assert counts(UNEQUAL, "25") == [3, 25, 25]


def test_long_tail() -> None:
    found = counts(BALANCED, "lt")
    assert sorted(found, reverse=True) == [round(200 * 100 ** (-rank / 9)) for rank in range(10)]
    assert sorted(found)[0] == 2
    assert found != sorted(found, reverse=True), "which classes are frequent is drawn"
    assert found == counts(BALANCED, "lt")
    assert found != counts(BALANCED, "lt", seed=1)
    assert counts(np.repeat([0, 1], [300, 8]), "lt") in ([300, 3], [3, 8])  # a class cannot give more than it has


def test_list_of_names(tmp_path: Path) -> None:
    names = ["cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/3.jpg"]
    path = tmp_path / "names"
    path.write_text("3.jpg\ncat/1.jpg\n\n")
    assert choose(np.zeros(4, np.int64), str(path), 0, iter(names)).tolist() == [0, 3]
    path.write_text("1.jpg\n")
    assert choose(np.zeros(4, np.int64), str(path), 0, names).tolist() == [0, 2]
    path.write_text("cat/1.jpg\nbird/1.jpg\n9.jpg\n")
    with pytest.raises(
        DataError,
        match=r"2 of the 3 names in .* were not found .*, for example '9.jpg'; names here look like 'dog/3.jpg'",
    ):
        choose(np.zeros(4, np.int64), str(path), 0, names)
    path.write_text("\n")
    with pytest.raises(DataError, match="expected one name per line"):
        choose(np.zeros(4, np.int64), str(path), 0, names)


def test_wrong_spec() -> None:
    for spec, message in (
        ("0%", "subset 0% must lie above 0% and at most at 100%"),
        ("101%", "must lie above 0%"),
        ("0", "subset '0' is neither a share"),
        ("-3", "neither a share"),
        ("ten", "neither a share .'10%'., a number per class .'25'., 'lt', nor a file that exists"),
    ):
        with pytest.raises(ConfigError, match=message):
            choose(BALANCED, spec, 0, [])
    with pytest.raises(DataError, match="subset lt needs labelled images of at least two classes"):
        choose(np.full(5, -1), "lt", 0, [])
