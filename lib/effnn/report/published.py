"""The published numbers in data/published: every row names its paper, table, figure or slide.

Figures and tables take them from here only, so a published number is never typed into code or prose.
"""

import pandas as pd

from effnn import paths
from effnn.base import InvalidInput

NUMERIC = ("y", "value", "year", "parameters")  # numbers, or empty where the source gives only words


def load(name: str) -> pd.DataFrame:
    """Return data/published/<name>.csv, number columns as floats with empty cells as NaN, everything else as text.

    The abscissa `x` is a number column unless some row names a category there (`points` makes it one where its own rows
    are numbers). Raises InvalidInput for an unknown name, naming the files there are, for a row without a source, and
    for a word where a number belongs.
    """
    path = paths.PUBLISHED / f"{name}.csv"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in paths.PUBLISHED.glob("*.csv"))) or "none"
        raise InvalidInput(f"no published numbers {name!r} in {paths.PUBLISHED}; there are: {known}")
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    if "source" not in frame.columns:
        raise InvalidInput(f"{path.name} has no column 'source'; every published number names its source")
    unsourced = frame["source"].str.strip() == ""
    if unsourced.any():
        raise InvalidInput(f"{path.name} row {unsourced.idxmax() + 2}: no source given")
    for column in frame.columns.intersection(NUMERIC):
        wrong = _not_numbers(frame[column])
        if wrong.any():
            row = wrong.idxmax()
            raise InvalidInput(f"{path.name} row {row + 2}: {column} {frame[column][row]!r} is not a number")
        frame[column] = pd.to_numeric(frame[column])
    return _numeric_abscissa(frame)


def points(name: str, **filters: object) -> pd.DataFrame:
    """Return the rows of `load(name)` whose columns equal the filters; a list or tuple allows any of its items.

    Example: `points("talk", metric="end-to-end time")`. An unknown column or an empty outcome raises InvalidInput with
    the choices, so that a renamed row is never drawn as nothing.
    """
    frame = load(name)
    for column, wanted in filters.items():
        if column not in frame.columns:
            raise InvalidInput(f"{name}.csv has no column {column!r}; it has {', '.join(frame.columns)}")
        allowed = list(wanted) if isinstance(wanted, list | tuple | set) else [wanted]
        kept = frame[frame[column].isin(allowed)]
        if kept.empty:
            choices = ", ".join(repr(item) for item in frame[column].drop_duplicates())
            raise InvalidInput(f"{name}.csv: no row with {column} = {wanted!r} is left; choices: {choices}")
        frame = kept
    return _numeric_abscissa(frame.reset_index(drop=True))


def _not_numbers(column: pd.Series) -> pd.Series:
    return pd.to_numeric(column, errors="coerce").isna() & (column.str.strip() != "")


def _numeric_abscissa(frame: pd.DataFrame) -> pd.DataFrame:
    if "x" in frame.columns and not pd.api.types.is_numeric_dtype(frame["x"]) and not _not_numbers(frame["x"]).any():
        return frame.assign(x=pd.to_numeric(frame["x"]))
    return frame
