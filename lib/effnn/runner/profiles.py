"""Profile files: what each notebook is run with at one size. `smoke` has none: it is the values in the cell itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from effnn import paths
from effnn.base import InvalidInput

SMOKE = "smoke"
LIMIT = "time_limit_minutes"


@dataclass(frozen=True)
class Profile:
    """One size of the run. entries: notebook name -> its values, None for smoke (every notebook, no values).

    time_limit: seconds that one notebook may take, None for no limit. source: the file, for messages.
    """

    name: str
    entries: Mapping[str, Mapping[str, object]] | None
    time_limit: float | None
    source: str

    def values(self, notebook: str) -> dict[str, object] | None:
        """Values of one notebook, None when the profile has no entry for it."""
        if self.entries is None:
            return {}
        return dict(self.entries[notebook]) if notebook in self.entries else None


def load_profile(name: str, notebooks: list[str]) -> Profile:
    """Return a profile by name; `notebooks` are the names that its entries may have. Raises InvalidInput."""
    if name == SMOKE:
        return Profile(SMOKE, None, None, "smoke")
    path = paths.PROFILES / f"{name}.yml"
    if not path.is_file():
        known = [SMOKE, *sorted(file.stem for file in paths.PROFILES.glob("*.yml"))]
        raise InvalidInput(f"there is no profile '{name}'; the profiles are {', '.join(known)}")
    content = _read(path)
    minutes = content.pop(LIMIT, None)
    if minutes is not None and (isinstance(minutes, bool) or not isinstance(minutes, int | float) or minutes <= 0):
        raise InvalidInput(f"{path.name}: {LIMIT} must be a positive number of minutes; got {minutes!r}")
    for notebook, values in content.items():
        if notebook not in notebooks:
            raise InvalidInput(
                f"{path.name} names the notebook '{notebook}', which does not exist; "
                f"the notebooks are {', '.join(notebooks) or 'none'}"
            )
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise InvalidInput(f"{path.name}: under '{notebook}' expected lines of the form 'parameter: value'")
        if values.setdefault("profile", name) != name:
            raise InvalidInput(f"{path.name}: under '{notebook}' profile must be '{name}'; got {values['profile']!r}")
    return Profile(name, content, None if minutes is None else 60.0 * minutes, path.name)


def _read(path: Path) -> dict[str, object]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise InvalidInput(f"{path.name} is not readable YAML: {error}") from None
    if not isinstance(content, dict):
        raise InvalidInput(f"{path.name}: expected a mapping from notebook names to parameters")
    return content
