"""Data sets of the hub at pinned revisions, kept as Parquet under data/cache.

`make data` downloads them once; everything else reads the Parquet files and never the network, so a run cannot begin
with a download that nobody asked for. Nothing falls back by itself: a data set that cannot be had stops the run with
one sentence that names it, the place looked at, and the ways out.
"""

import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from effnn import paths
from effnn.base import InvalidInput, NotAvailable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Repository:
    """A data set of the hub: its full id, the pinned revision, and the rows of each split by configuration."""

    id: str
    revision: str
    rows: dict[str, dict[str, int]]
    local: str  # how to load the same data from files, for the error message


# Row counts are those of the data set cards at these revisions.
REPOSITORIES = {
    "glue": Repository(
        "nyu-mll/glue",
        "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c",
        {
            "cola": {"train": 8551, "validation": 1043},
            "sst2": {"train": 67349, "validation": 872},
            "mrpc": {"train": 3668, "validation": 408},
            "qqp": {"train": 363846, "validation": 40430},
            "stsb": {"train": 5749, "validation": 1500},
            "mnli": {"train": 392702, "validation_matched": 9815, "validation_mismatched": 9832},
            "qnli": {"train": 104743, "validation": 5463},
            "rte": {"train": 2490, "validation": 277},
        },
        "the folder of its published TSV files",
    ),
    "squad": Repository(
        "rajpurkar/squad",
        "7b6d24c440a36b6815f21b70d25016731768db1f",
        {"plain_text": {"train": 87599, "validation": 10570}},
        "the folder of its published JSON files",
    ),
    "squad_v2": Repository(
        "rajpurkar/squad_v2",
        "3ffb306f725f7d2ce8394bc1873b24868140c412",
        {"squad_v2": {"train": 130319, "validation": 11873}},
        "the folder of its published JSON files",
    ),
}


def tables(repository: str, config: str) -> dict[str, dict[str, list]]:
    """Columns (name -> list) of every split of one configuration, from its Parquet files.

    Raises NotAvailable where it was not downloaded; nothing is downloaded here.
    """
    import pyarrow.parquet as parquet

    place, folder = REPOSITORIES[repository], _folder(repository, config)
    if not folder.is_dir():
        raise NotAvailable(
            f"{place.id} ({config}) was looked for in {folder}, which does not exist: run `make data` to download it, "
            f"give a local path ({place.local}) as the source, or use the laptop profile, which needs no download"
        )
    return {split: parquet.read_table(folder / f"{split}.parquet").to_pydict() for split in place.rows[config]}


def fetch(repository: str, config: str) -> Path:
    """Folder of one configuration's Parquet files, one a split; downloads and checks them if they are not there yet.

    Raises NotAvailable where the hub is out of reach, InvalidInput for a split of another size than the pinned one.
    """
    folder = _folder(repository, config)
    if not folder.is_dir():
        _download(REPOSITORIES[repository], config, folder)
    return folder


def download(repositories: list[str] | None = None) -> list[Path]:
    """Fetch all configurations of these repositories (default: all); returns their folders. This is `make data`."""
    wanted = [(name, config) for name in repositories or REPOSITORIES for config in REPOSITORIES[name].rows]
    return [fetch(name, config) for name, config in tqdm(wanted, desc="text data from the hub")]


def describe(repository: str, config: str) -> str:
    """The words for a source line: id, configuration and revision."""
    place = REPOSITORIES[repository]
    return f"hub: {place.id}/{config} at {place.revision[:12]}"


def _folder(repository: str, config: str) -> Path:
    place = REPOSITORIES[repository]
    if config not in place.rows:
        raise InvalidInput(f"{place.id} has no configuration {config!r} here: choose one of {', '.join(place.rows)}")
    return paths.CACHE / "hub" / f"{repository}-{config}-{place.revision[:12]}"


def _download(place: Repository, config: str, folder: Path) -> None:
    import datasets

    try:
        found = datasets.load_dataset(place.id, config, revision=place.revision)
    except Exception as error:  # offline, no such host, a proxy's refusal, a full disk: the way out is the same
        raise NotAvailable(
            f"{place.id} ({config}) is not in {folder} and could not be downloaded from the hub at revision "
            f"{place.revision[:12]} ({type(error).__name__}: {_first_line(error)}): give a local path ({place.local}) "
            f"as the source, or use the laptop profile, which needs no download"
        ) from error
    for split, rows in place.rows[config].items():
        have = len(found[split]) if split in found else 0
        if have != rows:
            raise InvalidInput(f"{place.id} ({config}): split {split} holds {have} rows, {rows} were expected")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # All files are written beside the target and renamed together, so the folder is either whole or absent.
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".tmp-"))
    try:
        for split in place.rows[config]:
            found[split].to_parquet(temporary / f"{split}.parquet")
        temporary.chmod(0o755)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]
