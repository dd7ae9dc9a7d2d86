"""Documents of data sets on the hub, read as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cfsp.checkpoint.hub import hub_is_reachable, is_told_to_stay_offline
from cfsp.errors import TextError
from cfsp.text.files import field, import_datasets


def hub_documents(hub_id: str, config: str, split: str, column: str) -> Iterator[Any]:
    """Yield what a column of a data set holds, in its own order.

    Raises:
        TextError: the hub cannot be reached, or does not serve it.
        MissingExtraError: the package datasets is not installed.
    """
    datasets = import_datasets()
    if not is_told_to_stay_offline() and not hub_is_reachable():
        raise TextError(
            f"the hub, which has {hub_id}, cannot be reached from here; give a local file "
            "or mixed, or set HF_HUB_OFFLINE=1 to read a copy in its cache"
        )
    try:
        data = datasets.load_dataset(hub_id, config or None, split=split, streaming=True)
        for record in data:
            yield field(record, column, hub_id)
    except TextError:
        raise
    except Exception as error:  # network, hub and parsing errors of many types
        raise TextError(
            f"the hub does not serve {hub_id} ({config}, {split}) now "
            f"({type(error).__name__}); check the name and the network, or give a local file"
        ) from error
