"""Orbax for one process that has no others to wait for."""

from __future__ import annotations

from typing import Any

import jax


def alone() -> Any:
    """Orbax's options for a caller that works alone, whatever processes it is connected with."""
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
    )
