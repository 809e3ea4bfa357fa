"""Fixtures that several files share. Torch computes on one thread: the tests run in parallel processes."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
# What one test process compiled the others, and the programs that tests start, need not compile again.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**30))
# Where the TPU's compiler is installed, JAX would look for a TPU too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parent))

import shape_checks

# Before the first import of the package.
shape_checks.install()

import numpy as np
import pytest
from peers import PEERS

# Files that share something expensive, each group in one process: the real model, or a finished run.
GROUPS = {
    "real_model": ("test_real_model.py", "test_quickstart.py"),
    "tiny_runs": ("test_pipeline.py", "test_bad_input.py", "test_selfstudy.py"),
    "resume": ("test_resume.py",),
    "meshes": ("test_parallel_devices.py",),
    "many_processes": ("test_many_processes.py",),
}


def pytest_configure(config):
    config.addinivalue_line("markers", "long: does not fit `make test`; run by `make test-long`")


def _skip_without(error: ModuleNotFoundError) -> None:
    """Skips a test that needs an absent peer; any other missing module is an error."""
    if (error.name or "").split(".")[0] not in PEERS:
        raise error
    pytest.skip(f"{error.name} is not installed: pip install -e '.[peers]'")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    try:
        return (yield)
    except ModuleNotFoundError as error:
        _skip_without(error)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except ModuleNotFoundError as error:
        _skip_without(error)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `-n`, a group of `GROUPS` runs in one process, every other test where there is room.

    (`xdist_group` marks do nothing with pytest 9.2 and pytest-xdist 3.8: the suffix of the node id is lost.)
    """
    if config.getvalue("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    group_of = {file: group for group, files in GROUPS.items() for file in files}

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of.get(Path(nodeid.split("::")[0]).name, nodeid)

    return Scheduling(config, log)


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Fresh inputs in every run; the seed is printed when the test fails (set TEST_SEED to repeat it)."""
    seed = int(os.environ.get("TEST_SEED") or secrets.randbits(32))
    print(f"TEST_SEED={seed}")
    return np.random.default_rng(seed)


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory) -> Path:
    """The file of a tiny random model with a tokenizer and chat template; 512 positions."""
    from tiny import write_tiny_gguf

    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="session")
def tiny_model(tiny_gguf):
    """That file, loaded in float32."""
    from cartridges_jax.models import load_model

    return load_model(str(tiny_gguf))


@pytest.fixture(scope="session")
def tiny_pair(tiny_model):
    """`tiny_model` and the same model in transformers: a `tiny.TinyPair`."""
    from tiny import TinyPair, random_weights, tiny_config, twin_of

    config = tiny_config()
    return TinyPair(tiny_model, twin_of(random_weights(config, seed=0), config))
