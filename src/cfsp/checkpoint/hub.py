"""Whether the hub can be reached: its own client tries for half a minute where there is none."""

from __future__ import annotations

_SECONDS = 5.0


def hub_is_missed() -> bool:
    """Return whether the hub cannot be reached, by one who did not set HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    return not constants.is_offline_mode() and not hub_is_reachable()


def hub_is_reachable() -> bool:
    """Ask the hub for anything, once; False also where the user set HF_HUB_OFFLINE."""
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception:  # of the HTTP library, whichever the client uses
        return False
    return True


def why_not_written(error: Exception) -> str:
    """Return why the hub's client cannot write into its cache; empty if that is not what failed."""
    # Errors of the network are of this type, too, but of no file.
    if not isinstance(error, OSError) or error.filename is None:
        return ""
    return (
        f"the hub's cache cannot be written to ({error.filename}: {error.strerror}); set HF_HOME "
        "to a directory that can be"
    )
