"""Data sets by name: the section `datasets` of params.yaml, which says where each split is and how it is read."""

import hashlib
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from splitlab.core.config import one_of, parse
from splitlab.core.errors import InputError
from splitlab.core.paths import ROOT
from splitlab.data.captions import Tokenizer, shortened
from splitlab.data.image_set import ImageSet, image_set
from splitlab.data.layouts import Listing, open_listing, split_off
from splitlab.data.reading import ReadOptions, Samples, column_of, read

SPLITS = ("private", "public", "heldout")
"""The splits that every data set has; beside them it may have `private-test`."""

LONG_CAPTIONS = ("refuse", "truncate")

PLACES = (*SPLITS, "private_test", "source")
"""The fields of `DatasetConfig` that say where something is."""


@dataclass(frozen=True)
class DatasetConfig(ReadOptions):
    """One data set: an entry of the section `datasets`.

    It has three splits, or one `source` that is divided. A source is a folder, zip or Parquet file in one of the
    layouts of `splitlab.data.layouts`, `<path>@<split>` of what has several, or `hub:<id>[@<split>]`; paths are
    relative to the project root, and nothing is copied from there.

    Attributes:
        private: the source of the private split, which no attack may read.
        public: the source of the public split: what the adversary has.
        heldout: the source of the held-out split, which nothing is trained on.
        private_test: the source of further private samples, never trained on, that classifiers are tested on (S3).
        source: what is divided, in place of the splits above.
        fractions: the share of each split in it, e.g. `{private: 0.4, public: 0.5, heldout: 0.1}`; what is left over is
            not used. Equal files, and rows of one `source` column value, come into one split.
        seed: of the division; public.
        long_captions: "refuse" those of more tokens than the base's text model takes, where they are encoded; or
            "truncate" them behind the last word that fits, and say how many.
    """

    private: str = ""
    public: str = ""
    heldout: str = ""
    private_test: str = ""
    source: str = ""
    fractions: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    long_captions: Annotated[str, one_of(LONG_CAPTIONS)] = "refuse"

    def __post_init__(self) -> None:
        """Refuse a set without its splits."""
        super().__post_init__()
        if bool(self.source) != bool(self.fractions):
            raise InputError("source and fractions go together: what is divided, and how; give both or neither")
        given = self.fractions if self.source else {split: 1.0 for split in PLACES if getattr(self, split)}
        if missing := [split for split in SPLITS if split not in given]:
            raise InputError(
                f"no {', '.join(missing)}: a data set needs {', '.join(SPLITS)}, each a source or a fraction"
            )
        if self.source:
            self._check_fractions()
        for one, other in itertools.combinations((*SPLITS, "private_test"), 2):
            if not self.source and getattr(self, other) and _real(self.place(one)) == _real(self.place(other)):
                raise InputError(
                    f"the {one} and the {other} split are both {self.place(one)}: what an attacker may read and "
                    "what he may not must be different images; give each split its own source"
                )

    def _check_fractions(self) -> None:
        if both := [split for split in PLACES[:-1] if getattr(self, split)]:
            raise InputError(f"both source and {both[0]}: give one source with fractions, or a source for each split")
        if unknown := set(self.fractions) - set(PLACES[:-1]):
            raise InputError(f"fractions: {', '.join(sorted(unknown))} is none of {', '.join(PLACES[:-1])}")
        shares = self.fractions.values()
        if not all(0 < share < 1 for share in shares) or sum(shares) > 1 + 1e-9:
            raise InputError(f"fractions must be above 0 and 1 at most together, got {self.fractions}")

    def place(self, split: str) -> str:
        """Return where `split` is, as `splitlab.data.layouts.open_listing` takes it, paths absolute.

        Raises:
            InputError: the data set has no such split.
        """
        name = split.replace("-", "_")
        there = list(self.fractions) if self.source else [one for one in PLACES[:-1] if getattr(self, one)]
        if name not in there:
            raise InputError(f"no split {split!r}; there: {', '.join(there)}. Give {name} its source, or use another")
        given = self.source or getattr(self, name)
        if given.startswith("hub:"):
            return str(given)
        path, part = split_off(given, ROOT)
        return f"{path}@{part}" if part else str(path)


def _real(place: str) -> str:
    """Return a place with all links followed."""
    path, part = split_off(place)
    return place if place.startswith("hub:") else f"{path.resolve()}@{part}"


def dataset_config(name: str, params: Mapping[str, Any]) -> DatasetConfig:
    """Return what a data set's name stands for: an entry of `params["datasets"]`, or else a path or `hub:<id>`.

    The path of a folder stands for its parts `private`, `public` and `heldout`: folders, zips or Parquet files;
    `hub:<id>` for the hub's splits of those names.

    Raises:
        InputError: there is no such entry, or the path does not have the three parts.
    """
    entries = params.get("datasets") or {}
    if name in entries:
        return parse(DatasetConfig, entries[name], where=f"datasets.{name}")
    if name.startswith("hub:"):
        return parse(DatasetConfig, {split: f"{name}@{split}" for split in SPLITS}, where=name)
    folder, part = split_off(name, ROOT)
    if part or not folder.exists():
        raise InputError(
            f"no data set {name!r:.200}: it is neither a path nor in the section datasets of params.yaml; "
            f"there: {', '.join(entries) or 'nothing'}"
        )
    parts = {split: _part(folder, split) for split in SPLITS}
    if missing := [split for split, part in parts.items() if part is None]:
        raise InputError(
            f"{folder}: no {', '.join(missing)} in it. The path of a data set is a folder with the three parts "
            f"{', '.join(SPLITS)}; what is one set of images needs an entry in the section datasets of params.yaml, "
            "which says where the three splits are, or how one source is divided"
        )
    return parse(DatasetConfig, {split: str(part) for split, part in parts.items()}, where=name)


def _part(folder: Path, split: str) -> Path | None:
    return next((path for end in ("", ".zip", ".parquet") if (path := folder / f"{split}{end}").exists()), None)


def load_split(
    dataset: str,
    split: str,
    params: Mapping[str, Any],
    *,
    tokenizer: Callable[[], Tokenizer],
    limit: int | None = None,
) -> ImageSet:
    """Load the `split` ("public", "heldout", "private", "private-test") of a data set.

    Args:
        dataset: a name in the section `datasets`, the path of a folder with three splits, or `hub:<id>`.
        split: which part.
        params: the content of params.yaml.
        tokenizer: returns the base's, by which long captions are cut; called where an entry asks for that.
        limit: read the first `limit` samples at most.

    Raises:
        InputError: there is no such data set or split, or it cannot be read.
    """
    config = dataset_config(dataset, params)
    listing = open_listing(config.place(split), image_column=config.columns.get("image", ""))
    indices: Sequence[int] = range(min(config.limit or len(listing.rows), len(listing.rows)))
    if config.source:
        indices = divided(listing, config, indices)[split.replace("-", "_")]
    samples = read(listing, config, indices[:limit])
    if config.long_captions == "truncate":
        samples = _truncated(samples, f"data set {dataset}, {split}", tokenizer())
    return image_set(*samples)


def _truncated(samples: Samples, name: str, tokenizer: Tokenizer) -> Samples:
    """Cut long captions and say how many there were."""
    prompts = shortened(samples.prompts, tokenizer)
    cut = [index for index, prompt in enumerate(prompts) if prompt != samples.prompts[index]]
    if cut:
        warnings.warn(
            f"{name}: {len(cut)} of {len(prompts)} captions were cut to the {tokenizer.model_max_length} tokens that "
            f"the text model takes, the first that of {samples.sources[cut[0]] or f'sample {cut[0]}'}",
            stacklevel=3,
        )
    return samples._replace(prompts=prompts)


def divided(listing: Listing, config: DatasetConfig, indices: Sequence[int]) -> dict[str, list[int]]:
    """Divide the rows `indices` of one source: split -> its rows, in their order.

    The division depends on the seed and on the content of the files, not on their order.

    Raises:
        InputError: a split would be empty.
    """
    image = column_of(listing, config, "image", needed=True)
    source = column_of(listing, config, "source")
    groups: dict[str, list[int]] = {}
    for index in indices:
        row = listing.rows[index]
        original = str(row.get(source) or "") if source else ""
        if not original:
            try:
                original = hashlib.sha256(listing.read(row.get(image))[1]).hexdigest()
            except InputError as error:
                raise InputError(f"{listing.name}: {listing.place(index)}: column {image}: {error}") from None
        groups.setdefault(original, []).append(index)
    order = sorted(groups, key=lambda original: hashlib.sha256(f"{config.seed}/{original}".encode()).digest())
    parts: dict[str, list[int]] = {split: [] for split in PLACES if split in config.fractions}
    edges = [round(len(indices) * share) for share in itertools.accumulate(config.fractions[split] for split in parts)]
    done = 0
    for original in order:
        split = next((split for split, edge in zip(parts, edges, strict=True) if done < edge), None)
        done += len(groups[original])
        if split:
            parts[split] += groups[original]
    _check_shares(parts, config, len(indices), f"{listing.name}: {len(indices)} rows", len(groups), source)
    return {split: sorted(part) for split, part in parts.items()}


def _check_shares(
    parts: Mapping[str, list[int]], config: DatasetConfig, n: int, name: str, n_groups: int, source: str
) -> None:
    """Refuse empty splits; warn of those that rows which stay together make larger or smaller than asked."""
    if source:
        name += f" of {n_groups} originals (column {source}: its rows stay together)"
    advice = ", or say columns: {source: ''} if that names no originals" if source else ""
    if empty := [split for split, part in parts.items() if not part]:
        raise InputError(f"{name} leave nothing for {', '.join(empty)}; change the fractions{advice}")
    if any(abs(len(part) - config.fractions[split] * n) > max(1, 0.05 * n) for split, part in parts.items()):
        given = ", ".join(f"{split} {len(part)}" for split, part in parts.items())
        warnings.warn(f"{name} divide otherwise than asked: {given}{advice}", stacklevel=4)
