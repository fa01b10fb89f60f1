"""Downloading the corpora of the hub, by choice: rows are streamed into Parquet shards under data/cache.

C4 and OpenWebText can be fetched in part. A download that was cut off goes on after the last whole shard; one that
reached its limit goes on when it is asked for more.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from tqdm.auto import tqdm

from effnn.base import InvalidInput, atomic_folder, atomic_path, write_json
from effnn.data import hub
from effnn.data.corpus.hub import State, read_state, shards, state_path
from effnn.data.files.reading import clean

NAMES = (*hub.CORPORA, *hub.TOKENIZERS)
LIMIT_TOKENS = 1_000_000_000
# GPT-2's BPE makes English text about 4.4 characters per token; more are fetched, so that the limit is reached.
CHARACTERS_PER_TOKEN = 5
HELD_OUT_CHARACTERS = 50_000_000  # of C4's validation split
SHARD_CHARACTERS = 100_000_000


def download(names: Iterable[str] = NAMES, limit_tokens: int = LIMIT_TOKENS) -> list[Path]:
    """Fetch these corpora and, for "gpt2", its tokenizer; returns their folders.

    limit_tokens: about how many GPT-2 tokens of C4 and OpenWebText to fetch, each. Raises NotAvailable where the hub is
    out of reach (what was fetched is kept), and InvalidInput for a split of another size than the pinned one.
    """
    if limit_tokens < 1:
        raise InvalidInput(f"limit_tokens={limit_tokens}: expected at least 1")
    return [fetch_gpt2() if name == "gpt2" else fetch(name, limit_tokens) for name in names]


def fetch(name: str, limit_tokens: int = LIMIT_TOKENS) -> Path:
    """Folder of one corpus, with all of its rows or as many as the limit asks for; see `download`."""
    folder = hub.folder_of(name)
    for split, rows in hub.CORPORA[name].rows[hub.CORPORA[name].config].items():
        wanted = None if rows else limit_tokens * CHARACTERS_PER_TOKEN if split == "train" else HELD_OUT_CHARACTERS
        _fetch_split(name, split, folder, wanted)
    return folder


def fetch_gpt2() -> Path:
    """Folder of GPT-2's tokenizer. Raises NotAvailable where the hub is out of reach."""
    from transformers import AutoTokenizer

    folder, entry = hub.folder_of("gpt2"), hub.TOKENIZERS["gpt2"]
    if not folder.is_dir():
        try:
            tokenizer = AutoTokenizer.from_pretrained(entry.id, revision=entry.revision)
        except Exception as error:
            raise hub.out_of_reach("gpt2", entry.config, error) from error
        with atomic_folder(folder) as temporary:
            tokenizer.save_pretrained(temporary)
    return folder


def _fetch_split(name: str, split: str, folder: Path, wanted: int | None) -> None:
    """Fetch rows until the split holds `wanted` characters (None: all rows), from where the shards end."""
    entry = hub.CORPORA[name]
    if (known := read_state(folder, split)) and known.whole:
        return
    sizes = [_size(path) for path in shards(folder, split)]
    count, rows, characters = len(sizes), sum(size[0] for size in sizes), sum(size[1] for size in sizes)
    ended = False
    if wanted is None or characters < wanted:
        try:
            with tqdm(initial=characters, total=wanted, desc=entry.id, unit="char", unit_scale=True) as progress:
                rest = None if wanted is None else wanted - characters
                for texts in _in_shards(_stream(entry, split, rows), rest):
                    size = sum(map(len, texts))
                    _write_shard(folder / f"{split}-{count:05d}.parquet", texts, size)
                    count, rows, characters = count + 1, rows + len(texts), characters + size
                    progress.update(size)
        except Exception as error:  # offline, no such host, a proxy's refusal, a full disk: the way out is the same
            raise hub.out_of_reach(name, entry.config, error, f"{rows:,} rows of {split} are") from error
        ended = wanted is None or characters < wanted
    try:
        hub.check_size(name, entry.config, split, rows, entry.rows[entry.config][split])
    except InvalidInput:
        for path in shards(folder, split):
            path.unlink()
        raise
    write_json(state_path(folder, split), asdict(State(entry.revision, rows, characters, ended)))


def _stream(entry: hub.HubSet, split: str, skipped: int) -> Iterator[str]:
    import datasets

    rows = datasets.load_dataset(entry.id, entry.config, split=split, streaming=True, revision=entry.revision)
    return (clean(row["text"]) for row in (rows.skip(skipped) if skipped else rows))


def _in_shards(texts: Iterator[str], characters: int | None) -> Iterator[list[str]]:
    """The texts in lists for one shard each, until there are so many characters in all (None: until the end)."""
    held, size, total = [], 0, 0
    for text in texts:
        held.append(text)
        size += len(text)
        total += len(text)
        enough = characters is not None and total >= characters
        if enough or size >= SHARD_CHARACTERS:
            yield held
            held, size = [], 0
        if enough:
            return
    if held:
        yield held


def _write_shard(path: Path, texts: list[str], characters: int) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"text": texts}).replace_schema_metadata({"characters": str(characters)})
    with atomic_path(path) as temporary:
        parquet.write_table(table, temporary, compression="zstd")


def _size(path: Path) -> tuple[int, int]:
    """Rows and characters of a shard."""
    from pyarrow import parquet

    return parquet.read_metadata(path).num_rows, int(parquet.read_schema(path).metadata[b"characters"])
