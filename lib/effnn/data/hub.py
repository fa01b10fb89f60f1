"""Data sets of the hub at pinned revisions: one table of them, where they lie under data/cache, and their errors.

`python -m effnn.data download` fetches them once; everything else reads files and never the network, so a run cannot
begin with a download that nobody asked for. Nothing falls back by itself: a data set that is not there stops the run
with one sentence that names it, the place looked at, and the ways out.

Small sets are fetched whole, here; corpora come in shards (corpus/download.py).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from effnn import paths
from effnn.base import InvalidInput, NotAvailable, atomic_folder, first_line


@dataclass(frozen=True)
class HubSet:
    """A data set of the hub, or a tokenizer.

    id: its full name on the hub.
    revision: the pinned commit.
    rows: configuration -> split -> number of rows; None for a split of which only the first part is fetched.
    command: what downloads it, for the error message.
    local: what a local path must hold instead, for the error message.
    one_text: of a corpus: each split is one text, and a row is a line of it; else every row is a document.
    carved: of a corpus: our split -> the hub's split, and the range of hashes that its rows must lie in.
    """

    id: str
    revision: str
    rows: dict[str, dict[str, int | None]]
    command: str
    local: str = "a text file, or a folder of them"
    one_text: bool = False
    carved: dict[str, tuple[str, float, float]] = field(default_factory=dict)

    @property
    def config(self) -> str:
        """The first configuration; a corpus has no other."""
        return next(iter(self.rows))


_DOWNLOAD = "python -m effnn.data download"
# Row counts are those of the data set cards at these revisions.
GLUE = {
    "glue": HubSet(
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
        command="make data",
        local="the folder of its published TSV files",
    )
}
SQUAD = {
    "squad": HubSet(
        "rajpurkar/squad",
        "7b6d24c440a36b6815f21b70d25016731768db1f",
        {"plain_text": {"train": 87599, "validation": 10570}},
        command=f"{_DOWNLOAD} squad",
        local="the folder of its published JSON files",
    ),
    "squad_v2": HubSet(
        "rajpurkar/squad_v2",
        "3ffb306f725f7d2ce8394bc1873b24868140c412",
        {"squad_v2": {"train": 130319, "validation": 11873}},
        command=f"{_DOWNLOAD} squad",
        local="the folder of its published JSON files",
    ),
}
CORPORA = {
    "wikitext-103": HubSet(
        "Salesforce/wikitext",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        {"wikitext-103-raw-v1": {"train": 1801350, "validation": 3760, "test": 4358}},
        command=f"{_DOWNLOAD} wikitext-103",
        one_text=True,
    ),
    "openwebtext": HubSet(
        "Skylion007/openwebtext",
        "b4325f019c648b1641a1784748667e8b74e5e064",
        {"plain_text": {"train": None}},
        command=f"{_DOWNLOAD} openwebtext",
        carved={"train": ("train", 0.0, 0.99), "validation": ("train", 0.99, 0.995), "test": ("train", 0.995, 1.0)},
    ),
    "c4": HubSet(
        "allenai/c4",
        "1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        {"en": {"train": None, "validation": None}},
        command=f"{_DOWNLOAD} c4",
        carved={"validation": ("validation", 0.0, 0.5), "test": ("validation", 0.5, 1.0)},
    ),
    "lambada": HubSet(
        "EleutherAI/lambada_openai",
        "900124bf3b8235c6daf21033af9948b3f07346c4",
        {"default": {"test": 5153}},
        command=f"{_DOWNLOAD} lambada",
        local="the file of its passages",
    ),
}
TOKENIZERS = {
    "gpt2": HubSet(
        "openai-community/gpt2",
        "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        {"tokenizer": {}},
        command=f"{_DOWNLOAD} gpt2",
        local="the folder of a saved tokenizer",
    )
}
TABLE = GLUE | SQUAD | CORPORA | TOKENIZERS


def folder_of(name: str, config: str = "") -> Path:
    """Where a set lies once it is downloaded, one folder per configuration. Raises InvalidInput for an unknown name."""
    if name not in TABLE:
        raise InvalidInput(f"unknown data set of the hub {name!r}: choose one of {', '.join(TABLE)}")
    entry = TABLE[name]
    config = config or entry.config
    if config not in entry.rows:
        raise InvalidInput(f"{entry.id} has no configuration {config!r} here: choose one of {', '.join(entry.rows)}")
    parts = [name, config, entry.revision[:12]] if len(entry.rows) > 1 else [name, entry.revision[:12]]
    return paths.CACHE / "hub" / "-".join(parts)


def describe(name: str, config: str = "") -> str:
    """The words for a source line: id, configuration and revision."""
    entry = TABLE[name]
    return f"hub: {entry.id}/{config or entry.config} at {entry.revision[:12]}"


def tables(name: str, config: str) -> dict[str, dict[str, list]]:
    """Columns (name -> list) of every split of one configuration that `fetch` left. Raises NotAvailable."""
    from pyarrow import parquet

    folder = folder_of(name, config)
    if not folder.is_dir():
        raise not_downloaded(name, config)
    return {split: parquet.read_table(folder / f"{split}.parquet").to_pydict() for split in TABLE[name].rows[config]}


def fetch(name: str, config: str) -> Path:
    """Folder of one configuration's Parquet files, one per split; downloads and checks them if they are not there yet.

    Raises NotAvailable where the hub is out of reach, InvalidInput for a split of another size than the pinned one.
    """
    entry, folder = TABLE[name], folder_of(name, config)
    if folder.is_dir():
        return folder
    import datasets  # takes seconds

    try:
        found = datasets.load_dataset(entry.id, config, revision=entry.revision)
    except Exception as error:  # offline, no such host, a proxy's refusal, a full disk: the way out is the same
        raise out_of_reach(name, config, error) from error
    for split, rows in entry.rows[config].items():
        check_size(name, config, split, len(found[split]) if split in found else 0, rows)
    with atomic_folder(folder) as temporary:
        for split in entry.rows[config]:
            found[split].to_parquet(temporary / f"{split}.parquet")
    return folder


def download(names: Iterable[str]) -> list[Path]:
    """Fetch all configurations of these sets, whole; returns their folders. Errors as of `fetch`."""
    wanted = [(name, config) for name in names for config in TABLE[name].rows]
    return [fetch(name, config) for name, config in tqdm(wanted, desc="data from the hub")]


def check_size(name: str, config: str, split: str, have: int, rows: int | None) -> None:
    """Raise InvalidInput for a split of another size than the pinned one.

    name, config, split: what was read.
    have: rows that were found.
    rows: rows that are pinned; None for any number.
    """
    if rows not in (None, have):
        raise InvalidInput(f"{TABLE[name].id} ({config}): split {split} holds {have} rows, {rows} were expected")


def not_downloaded(name: str, config: str = "") -> NotAvailable:
    """The error for a set that is not in its folder, or not whole."""
    entry = TABLE[name]
    return NotAvailable(
        f"{entry.id} ({config or entry.config}) was looked for in {folder_of(name, config)}, where it is not, or not "
        f"whole: run `{entry.command}`, {_ways_out(entry)}"
    )


def out_of_reach(name: str, config: str, error: Exception, have: str = "nothing is") -> NotAvailable:
    """The error for a download that failed. have: what is in the folder, such as "17 rows are"."""
    entry = TABLE[name]
    return NotAvailable(
        f"{entry.id} ({config}) could not be downloaded from the hub at revision {entry.revision[:12]} "
        f"({type(error).__name__}: {first_line(error)}); {have} in {folder_of(name, config)}: run this again, "
        f"{_ways_out(entry)}"
    )


def _ways_out(entry: HubSet) -> str:
    return f"give a local path ({entry.local}), or use the laptop profile, which needs no download"
