"""Records of data sets on the hub, read as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from cfsp.checkpoint.hub import hub_is_missed, why_not_written
from cfsp.errors import MissingExtraError, TextError
from cfsp.text.files import Record, import_datasets


@cache
def hub_columns(hub_id: str, config: str, split: str) -> frozenset[str]:
    """Return the columns of a data set; errors are those of `hub_records`."""
    record, _ = next(hub_records(hub_id, config, split), ({}, ""))
    return frozenset(record)


def hub_records(hub_id: str, config: str, split: str) -> Iterator[Record]:
    """Yield the records of a data set, in its own order.

    Raises:
        TextError: the hub cannot be reached, or does not serve it.
        MissingExtraError: the package datasets is not installed.
    """
    datasets = import_datasets()
    if hub_is_missed():
        raise TextError(
            f"the hub, which has {hub_id}, cannot be reached from here; give a local file "
            "or mixed, or set HF_HUB_OFFLINE=1 to read a copy in its cache"
        )
    try:
        data = datasets.load_dataset(hub_id, config or None, split=split, streaming=True)
        for record in data:
            yield record, hub_id
    except ImportError as error:  # Pillow: data sets decode pictures
        raise MissingExtraError("reading images", "images") from error
    except Exception as error:  # network, hub and parsing errors of many types
        if why := why_not_written(error):
            raise TextError(f"{hub_id} cannot be read: {why}") from error
        raise TextError(
            f"the hub does not serve {hub_id} ({config}, {split}) now "
            f"({type(error).__name__}); check the name and the network, or give a local file"
        ) from error
