"""Documents of data sets on the hub, read as a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from cfsp.checkpoint.hub import hub_is_missed, why_not_written
from cfsp.errors import MissingExtraError, TextError
from cfsp.text.files import import_datasets
from cfsp.text.images import IMAGE_COLUMN, Sample, sample_of
from cfsp.text.records import document_of


def hub_documents(hub_id: str, config: str, split: str, column: str) -> Iterator[Any]:
    """Yield what a column of a data set holds, in its own order.

    Raises:
        TextError: the hub cannot be reached, or does not serve it.
        MissingExtraError: the package datasets is not installed.
    """
    return _values(
        hub_id,
        config,
        split,
        lambda record: document_of(record, column, hub_id, beside_images=IMAGE_COLUMN in record),
    )


def hub_samples(hub_id: str, config: str, split: str, column: str) -> Iterator[Sample]:
    """Yield what a column of a data set holds and the images beside it, in its own order.

    Raises:
        TextError: the hub cannot be reached, or does not serve it.
        MissingExtraError: the package datasets is not installed.
    """
    return _values(hub_id, config, split, lambda record: sample_of(record, column, hub_id, None))


@cache
def hub_has_images(hub_id: str, config: str, split: str) -> bool:
    """Return whether a data set has a column of images.

    Raises:
        TextError: the hub cannot be reached, or does not serve it.
        MissingExtraError: the package datasets is not installed.
    """
    return IMAGE_COLUMN in next(_values(hub_id, config, split, lambda record: record), {})


def _values(hub_id: str, config: str, split: str, value_of: Callable[[Any], Any]) -> Iterator[Any]:
    datasets = import_datasets()
    if hub_is_missed():
        raise TextError(
            f"the hub, which has {hub_id}, cannot be reached from here; give a local file "
            "or mixed, or set HF_HUB_OFFLINE=1 to read a copy in its cache"
        )
    try:
        data = datasets.load_dataset(hub_id, config or None, split=split, streaming=True)
        for record in data:
            yield value_of(record)
    except TextError:
        raise
    except ImportError as error:  # Pillow: data sets decode pictures
        raise MissingExtraError("reading images", "images") from error
    except Exception as error:  # network, hub and parsing errors of many types
        if why := why_not_written(error):
            raise TextError(f"{hub_id} cannot be read: {why}") from error
        raise TextError(
            f"the hub does not serve {hub_id} ({config}, {split}) now "
            f"({type(error).__name__}); check the name and the network, or give a local file"
        ) from error
