"""Which rows each training of a cross-validation holds out."""

from collections.abc import Hashable, Sequence

import numpy as np

FOLDS = 3  # each trains on two thirds of the rows: with the last training on all rows, three times its cost
MOST_ROWS = 1000  # from so many training rows on, a tenth of them says enough


def make_folds(
    marks: np.ndarray, keys: Sequence[Hashable], seed: int, folds: int = FOLDS
) -> np.ndarray | None:
    """Draw the fold of each row, each class spread over the folds as evenly as it goes (iterative
    stratification, Sechidis et al. 2011).

    Rows with equal keys (one text that stands twice) stay together. A row that would leave a training without
    one of its classes is in no fold: every training has it and nothing is decided on it.

    Args:
        marks: (N, C) bool, which classes a row has; regression has one class.
        keys: N keys.
        seed: of the order in which rows are taken.

    Returns:
        (N,) int64, the fold that holds the row out, -1 where none does; None where fewer than two folds hold
        rows.
    """
    marks = np.concatenate(
        [marks, ~marks.any(1, keepdims=True)], 1
    )  # rows without a label are a class of their own
    order = np.random.default_rng([seed, 11]).permutation(len(keys))
    groups: dict[Hashable, list[int]] = {}
    for i in order.tolist():
        groups.setdefault(keys[i], []).append(i)
    members = list(groups.values())
    has = np.array([marks[rows].any(0) for rows in members])  # (groups, C)
    sizes = np.array([len(rows) for rows in members])
    fold_of = np.full(len(members), -1)
    rows_in, classes_in = np.zeros(folds), np.zeros((folds, marks.shape[1]))
    left = np.ones(len(members), dtype=bool)
    while left.any():
        counts = has[left].sum(0)
        rarest = int(np.where(counts > 0, counts, np.iinfo(np.int64).max).argmin())
        for g in np.flatnonzero(left & has[:, rarest]).tolist():
            fold = min(range(folds), key=lambda f: (classes_in[f, rarest], rows_in[f], f))
            fold_of[g], left[g] = fold, False
            rows_in[fold] += sizes[g]
            classes_in[fold] += has[g]
    changed = True
    while changed:
        changed = False
        for fold in range(folds):
            lost = has[fold_of == fold].any(0) & ~has[fold_of != fold].any(0)
            stay = (fold_of == fold) & has[:, lost].any(1)
            changed |= bool(stay.any())
            fold_of[stay] = -1
    found = np.full(len(keys), -1)
    for g, rows in enumerate(members):
        found[rows] = fold_of[g]
    return found if len(set(found[found >= 0].tolist())) > 1 else None
