"""What a name or path means: files, directories, known names and their terms."""

from __future__ import annotations

import shutil

import pytest
from test_wheels import fake, parts, pretend_pip  # noqa: F401

from cartridges_jax.errors import UserError
from cartridges_jax.formats.sources import locate


def test_a_path_means_itself_and_a_directory_its_only_file(fake, tmp_path):
    assert locate(fake.file) == fake.file
    assert locate(tmp_path) == fake.file
    shutil.copy(fake.file, tmp_path / "second.gguf")
    with pytest.raises(UserError, match="found 2 .second.gguf, toy.gguf."):
        locate(tmp_path)


def test_an_unknown_name_lists_the_known_ones(fake):
    with pytest.raises(UserError, match="'no-such-model' is neither a known model .*smollm2-135m-instruct"):
        locate("no-such-model")


def test_a_directory_is_a_model_of_its_own_or_its_only_gguf(tmp_path):
    (tmp_path / "a.gguf").touch()
    (tmp_path / "config.json").write_text("{}")
    assert locate(tmp_path) == tmp_path / "a.gguf"  # as the repositories of converted models are
    (tmp_path / "b.gguf").touch()
    with pytest.raises(UserError, match="found 2 .a.gguf, b.gguf."):
        locate(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert locate(tmp_path) == tmp_path
    assert locate(str(tmp_path)) == tmp_path
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="holds a.gguf and model.safetensors, but no config.json"):
        locate(tmp_path)


def test_a_directory_with_a_config_but_no_weights_is_left_to_its_reader(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    assert locate(tmp_path) == tmp_path


def test_terms_are_asked_for_every_time_before_anything_is_fetched(parts, monkeypatch):
    calls = pretend_pip(monkeypatch, says="no network")
    refusal = "'split' comes under the Toy Terms: read https://example.org/terms .*set TOY_TERMS=1"
    for value in (None, "0", ""):
        if value is not None:
            monkeypatch.setenv("TOY_TERMS", value)
        with pytest.raises(UserError, match=refusal):
            locate("split")
    assert not calls
    assert not parts.cache.exists()
    parts.cache.mkdir()
    for path in parts.wheels:
        shutil.copy(path, parts.cache)
    monkeypatch.setenv("TOY_TERMS", "1")
    assert locate("split").is_file()
    monkeypatch.delenv("TOY_TERMS")
    with pytest.raises(UserError, match=refusal):
        locate("split")


def test_gemma_is_behind_its_terms(monkeypatch):
    monkeypatch.delenv("CARTRIDGES_JAX_ACCEPT_GEMMA_TERMS", raising=False)
    with pytest.raises(UserError, match="https://ai.google.dev/gemma/terms .*CARTRIDGES_JAX_ACCEPT_GEMMA_TERMS=1"):
        locate("gemma3-270m")
