"""Connecting the processes of a job: by flags, or by the scheduler that started them.

    auto    flags if given; else SLURM, Cloud TPU or Kubernetes if one of them started several
            processes; else this process is alone
    on      the same, but being alone is an error
    off     alone, under any scheduler

JAX reads the schedulers' settings (`jax.distributed.initialize`); this module only decides
which one to ask, so that an interactive shell or a notebook on such a machine stays alone.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping

import jax

from cartridges_jax.errors import UserError, one_line
from cartridges_jax.parallel.job import Job, ManyProcesses

DISTRIBUTED = ("auto", "on", "off")


def scheduler(environ: Mapping[str, str]) -> str:
    """JAX's name of the scheduler that started this process as one of several, or ""."""
    # Under srun; in the shell of an salloc there is no step.
    if "SLURM_STEP_NODELIST" in environ and int(environ.get("SLURM_NTASKS", "1")) > 1:
        return "slurm"
    # Google sets these on pods of GKE with TPUs, which are indexed jobs too.
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
    if "," in hosts or int(environ.get("MEGASCALE_NUM_SLICES") or 1) > 1:
        return "gketpu"
    if hosts:
        return ""
    # An indexed job, alone or of a JobSet; other pods (a notebook, a CI runner) have no index.
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return "k8s"
    return "gcetpu" if _is_tpu_vm(environ) else ""


def _is_tpu_vm(environ: Mapping[str, str]) -> bool:
    """Whether JAX found the chips of a Cloud TPU VM, whose metadata server knows the other workers."""
    from jax._src import cloud_tpu_init

    return cloud_tpu_init.running_in_cloud_tpu_vm and "TPU_SKIP_MDS_QUERY" not in environ


def _local_devices(environ: Mapping[str, str]) -> list[int] | None:
    """All of the node's GPUs under SLURM with one task per node, where JAX would use the first only."""
    if environ.get("SLURM_NTASKS") == environ.get("SLURM_NNODES") and environ.get("SLURM_GPUS_ON_NODE", "").isdecimal():
        return list(range(int(environ["SLURM_GPUS_ON_NODE"])))
    return None


def start_job(
    distributed: str = "auto",
    *,
    coordinator: str = "",
    num_processes: int | None = None,
    process_id: int | None = None,
    peer_seconds: float = 100.0,
    stall_seconds: float = 1800.0,
) -> Job:
    """Connects this process with the others of its job; must be called before any device is used.

    Args:
      distributed: "auto", "on" or "off"; see the module.
      coordinator: HOST:PORT at which process 0 listens.
      num_processes, process_id: the number of processes, and this one's index from 0.
      peer_seconds: after this time without a sign of life a process counts as lost.
      stall_seconds: after this time without a step of any process the job counts as stalled.

    Raises:
      UserError: flags that contradict each other or lack one, no scheduler where one is
        needed, or processes that do not connect.
    """
    if distributed not in DISTRIBUTED:
        raise UserError(f"distributed={distributed!r}: choose one of {', '.join(DISTRIBUTED)}")
    if min(peer_seconds, stall_seconds) <= 0:
        raise UserError(f"peer_seconds={peer_seconds} and stall_seconds={stall_seconds} must be above 0")
    given = {
        name: value
        for name, value in (
            ("coordinator", coordinator or None),
            ("num_processes", num_processes),
            ("process_id", process_id),
        )
        if value is not None
    }
    if distributed == "off":
        if given:
            raise UserError(f"distributed='off' contradicts {', '.join(given)}: leave one of them out")
        return Job()
    if given:
        return _connected(_explicit(given), f"the coordinator at {coordinator}", peer_seconds, stall_seconds)
    found = scheduler(os.environ)
    if not found:
        if distributed == "on":
            raise UserError(
                "distributed='on', but neither SLURM nor Cloud TPU nor Kubernetes started this process as one of several: "
                "give coordinator (HOST:PORT), num_processes and process_id"
            )
        return Job()
    if found == "k8s" and importlib.util.find_spec("kubernetes") is None:
        raise UserError(
            "this pod is one of an indexed Kubernetes job, whose others JAX finds through the package kubernetes: pip install "
            "'jax[k8s]', or give coordinator, num_processes and process_id, or distributed='off' if it works alone"
        )
    settings = {"cluster_detection_method": found}
    if found == "slurm":
        settings["local_device_ids"] = _local_devices(os.environ)
    return _connected(settings, f"the coordinator that {found} names", peer_seconds, stall_seconds)


def _explicit(given: Mapping) -> dict:
    missing = [name for name in ("coordinator", "num_processes", "process_id") if name not in given]
    if missing:
        raise UserError(f"{', '.join(given)} without {', '.join(missing)}: several processes need all three")
    host, _, port = given["coordinator"].rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"coordinator={given['coordinator']!r}: write it as HOST:PORT")
    if not 0 <= given["process_id"] < given["num_processes"]:
        raise UserError(
            f"process_id={given['process_id']} of num_processes={given['num_processes']}: must be between 0 and "
            f"{given['num_processes'] - 1}"
        )
    return {
        "coordinator_address": given["coordinator"],
        "num_processes": given["num_processes"],
        "process_id": given["process_id"],
        "cluster_detection_method": "deactivate",
    }


def _connected(settings: Mapping, whom: str, peer_seconds: float, stall_seconds: float) -> Job:
    # Preemption is the job's affair (see `parallel.job`): JAX's service would take SIGTERM for itself, even
    # before anything is there to be saved.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        # The job's own watch comes first; JAX's is left for what it may not see.
        jax.distributed.initialize(**settings, heartbeat_timeout_seconds=int(2 * peer_seconds) + 60)
    except Exception as error:  # noqa: BLE001 - each scheduler's client has errors of its own
        raise UserError(
            f"no connection with the other processes through {whom} ({one_line(error)[:200]}): check that all were "
            "started alike, or run alone with distributed='off'"
        ) from error
    if jax.process_count() == 1:
        return Job()
    return ManyProcesses(peer_seconds=peer_seconds, stall_seconds=stall_seconds)
