"""The versions of everything that computes: results hold for them."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import version


@cache  # the metadata of a package is a long text, read and parsed each time
def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that compute, by name."""
    packages = ("cfsp-llm", "torch", "transformers", "safetensors", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
