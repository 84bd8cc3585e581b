"""Choosing a part of the images."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from mimlet.data.seeding import key
from mimlet.errors import ConfigError, DataError

IMBALANCE = 100
"""Largest over smallest class of a long-tailed subset."""


def choose(labels: NDArray[np.int64], spec: str, seed: int, names: Iterable[str]) -> NDArray[np.int64]:
    """Sorted indices of a subset of the images with these labels [n]. Images without a label (-1) form a class of
    their own.

    - '': all.
    - '10%': so many of all images, and at least one per class, as equally over the classes as their sizes allow.
      Without labels: at random.
    - '25': so many per class; a smaller class is taken whole.
    - 'lt': long-tailed. The class of rank r (in an order drawn from the seed) gets n_max * 100^(-r / (C - 1)) images,
      n_max being the size of the largest class, or all it has if that is less (Cui et al., "Class-Balanced Loss",
      2019, section 5.1).
    - otherwise a file with one name per line, whole or without its folder, to be found among `names` (which is read
      only then).

    For one seed the smaller percentage or number lies inside the larger one. Raises `ConfigError` for a spec of no
    known form, `DataError` where it does not fit the data.
    """
    if not spec:
        return np.arange(len(labels))
    if os.path.isfile(spec):
        return _listed(spec, names)
    generator = np.random.default_rng(key("subset", seed))
    classes, ids, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    rank_of_class = generator.permutation(len(classes))[ids]
    place = _place_in_class(ids, generator.random(len(labels)))
    if percent := re.fullmatch(r"(\d+(?:\.\d+)?)%", spec):
        share = float(percent[1]) / 100
        if not 0 < share <= 1:
            raise ConfigError(f"subset {spec} must lie above 0% and at most at 100%")
        wanted = max(round(share * len(labels)), len(classes))
        # One image of every class, then a second one of every class, and so on.
        return np.sort(np.lexsort((rank_of_class, place))[:wanted])
    if re.fullmatch(r"[1-9]\d*", spec):
        return np.flatnonzero(place < int(spec))
    if spec == "lt":
        if len(classes) < 2:
            raise DataError("subset lt needs labelled images of at least two classes, in one folder per class")
        quota = np.rint(sizes.max() * IMBALANCE ** (-rank_of_class / (len(classes) - 1)))
        return np.flatnonzero(place < np.maximum(quota, 1))
    raise ConfigError(
        f"subset '{spec}' is neither a share ('10%'), a number per class ('25'), 'lt', nor a file that exists"
    )


def _place_in_class(ids: NDArray[np.int64], noise: NDArray[np.float64]) -> NDArray[np.int64]:
    """For each image its position in a random order of its class."""
    order = np.lexsort((noise, ids))
    starts = np.searchsorted(ids[order], ids[order])
    place = np.empty(len(ids), np.int64)
    place[order] = np.arange(len(ids)) - starts
    return place


def _listed(path: str, names: Iterable[str]) -> NDArray[np.int64]:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        wanted = {line.strip() for line in file} - {""}
    found: set[str] = set()
    chosen: list[int] = []
    example = ""
    for i, example in enumerate(names):
        hit = example if example in wanted else example.rpartition("/")[2]
        if hit in wanted:
            chosen.append(i)
            found.add(hit)
    missing = sorted(wanted - found)
    if missing or not wanted:
        raise DataError(
            f"{len(missing)} of the {len(wanted)} names in {path} were not found among the images"
            + (
                f", for example '{missing[0]}'; names here look like '{example}'"
                if missing
                else "; expected one name per line"
            )
        )
    return np.array(chosen, np.int64)
