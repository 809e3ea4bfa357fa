"""The typed configuration of a run, and its way in and out of `ml_collections`."""

from __future__ import annotations

import dataclasses

import ml_collections

from cartridges_jax.corpus import QUICKSTART
from cartridges_jax.distill.settings import TrainSettings
from cartridges_jax.errors import UserError
from cartridges_jax.evaluation.evaluate import EvaluationSettings
from cartridges_jax.models.model import AUTO, DTYPES, WEIGHTS, chosen_weights
from cartridges_jax.parallel import parse_mesh
from cartridges_jax.prefixes import check_prefix_name
from cartridges_jax.selfstudy.settings import SynthesisSettings
from cartridges_jax.typed_config import build, config_values


@dataclasses.dataclass(frozen=True)
class CartridgeSettings:
    """The cartridge's size and what it starts from.

    Attributes:
      num_slots: P; 0 is "auto", one slot for every `tokens_per_slot` tokens of the corpus.
      tokens_per_slot: the ratio of auto.
      num_frozen: first slots that are not trained (paper: 1, the attention sink).
      init: the initial prefix, by its name in `prefixes` ("first_tokens", "pretrained:DIR", …).
    """

    num_slots: int = 0
    tokens_per_slot: float = 8.0
    num_frozen: int = 1
    init: str = "first_tokens"


@dataclasses.dataclass(frozen=True)
class PodSettings:
    """The hardware that `launch/aot.py` compiles for; a run itself takes the devices that there are.

    Attributes:
      topology: such as "v5e:4x4" or "h100:8"; "" for none in particular.
      decode_rows: conversations that decode together; self-study's 128 (`sampling.generate_tokens`) by default.
      context_tokens: length of the text that the cartridge replaces; a model sees as much as its context holds.
    """

    topology: str = ""
    decode_rows: int = 128
    context_tokens: int = 4096

    def check(self) -> None:
        """Raises UserError for a value for which no program could be compiled."""
        for name in ("decode_rows", "context_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"pod.{name}={getattr(self, name)}: must be 1 or more")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The settings that determine a run.

    The defaults suit a small model on a CPU; a size of 0 means "auto" (see `sizes`).

    Attributes:
      model: registry name, Hugging Face directory, GGUF file, or hub id ("org/name").
      dtype: "float32" or "bfloat16", of the model.
      weights: "int8" stores the frozen model's matrices in 8 bits, "bfloat16" under a float32
        model in 16; "" in `dtype`; "auto" is the fastest here (`with_weights_chosen`).
      thinking: lets a model that can think before it answers do so.
      windows_see_prefix: False lets layers with a sliding window see the whole cartridge.
      accept_license: accepts the terms of a registry model that is offered under terms of its own.
      mesh: the devices, such as "data:2,fsdp:4,tensor:2" (-1 is the rest); "" is one device.
      seed: determines every draw and the data order.
      corpus: a file, a folder, a glob pattern, "-" for standard input, or several of these separated by
        commas; "quickstart" is the document that ships with the package.
      article: names of the documents to take, separated by commas, such as articles of a SQuAD file; "" takes all.
      max_tokens: every document is cut at the last sentence end within this many tokens; 0 is the whole.
      questions: JSONL of {"question", "answers"}; "" for none. SQuAD articles and "quickstart" bring their own.
      new_evaluation: accepts other evaluation questions than those that the workdir has frozen.
      heldout: self-study conversations that are not trained on.
    """

    model: str = "smollm2-135m-instruct"
    dtype: str = "float32"
    weights: str = AUTO
    thinking: bool = False
    windows_see_prefix: bool = True
    accept_license: bool = False
    mesh: str = ""
    seed: int = 0
    corpus: str = QUICKSTART
    article: str = ""
    max_tokens: int = 0
    questions: str = ""
    new_evaluation: bool = False
    heldout: int = 24
    cartridge: CartridgeSettings = dataclasses.field(default_factory=CartridgeSettings)
    study: SynthesisSettings = dataclasses.field(default_factory=SynthesisSettings)
    train: TrainSettings = dataclasses.field(default_factory=TrainSettings)
    evaluation: EvaluationSettings = dataclasses.field(default_factory=EvaluationSettings)
    pod: PodSettings = dataclasses.field(default_factory=PodSettings)

    def check(self) -> None:
        """Raises UserError for a value that no run could use, before anything is loaded."""
        if self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype!r}: choose one of {', '.join(DTYPES)}")
        if self.weights not in (AUTO, *WEIGHTS):
            raise UserError(f"weights={self.weights!r}: choose 'auto', 'int8', 'bfloat16', or '' for the model's dtype")
        if self.weights == self.dtype == "bfloat16":
            raise UserError("weights='bfloat16' belongs to dtype='float32': leave weights ''")
        if self.mesh:
            parse_mesh(self.mesh)
        if not 0 <= self.seed < 2**31:
            raise UserError(f"seed={self.seed}: must be between 0 and {2**31 - 1}")
        if self.max_tokens < 0:
            raise UserError(f"max_tokens={self.max_tokens}: must be 0 (all) or more")
        if self.heldout < 0:
            raise UserError(f"heldout={self.heldout}: must be 0 or more")
        if self.study.conversations and self.heldout >= self.study.conversations:
            raise UserError(
                f"heldout={self.heldout} leaves nothing of study.conversations={self.study.conversations} to train on"
            )
        if self.cartridge.num_frozen < 0:
            raise UserError(f"cartridge.num_frozen={self.cartridge.num_frozen}: must be 0 or more")
        if not self.cartridge.tokens_per_slot > 0:
            raise UserError(f"cartridge.tokens_per_slot={self.cartridge.tokens_per_slot}: must be above 0")
        if self.cartridge.num_slots and self.cartridge.num_slots <= self.cartridge.num_frozen:
            raise UserError(
                f"cartridge.num_slots={self.cartridge.num_slots} with cartridge.num_frozen="
                f"{self.cartridge.num_frozen} leaves no slot to train: raise num_slots"
            )
        check_prefix_name(self.cartridge.init)
        self.study.check()
        self.train.check()
        if self.train.targets == "all" and not self.study.score_user_messages:
            raise UserError(
                "train.targets='all' needs the teacher's view of A's tokens: set study.score_user_messages=True"
            )
        self.evaluation.check()
        self.pod.check()

    def with_weights_chosen(self) -> RunConfig:
        """Replaces `weights` "auto" by its meaning on this machine."""
        return dataclasses.replace(self, weights=chosen_weights(self.weights, self.dtype))


def default_config() -> ml_collections.ConfigDict:
    """The defaults of `RunConfig`, which experiments override."""
    return ml_collections.ConfigDict(dataclasses.asdict(RunConfig()))


def from_config_dict(config: ml_collections.ConfigDict) -> RunConfig:
    """The typed, checked config.

    Raises:
      UserError: a field that is unknown, missing or of the wrong type, or a value that
        no run could use.
    """
    run = build(RunConfig, config_values(config), "config", "pipeline.config.default_config()")
    run.check()
    return run
