"""Orbax in one process that waits for no others."""

from __future__ import annotations

from typing import Any

import jax


def alone() -> Any:
    """Orbax's options for a caller that works alone, also where it is connected with other processes."""
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
    )
