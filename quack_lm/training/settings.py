"""What the `trainer` section of a config sets."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from quack_lm.errors import UserError
from quack_lm.training.state import StabilityRules

# Three float32 numbers. In memory: a weight, its gradient and one moment of the optimizer, with the activations on top.
# In a checkpoint: a weight and at most two moments.
BYTES_PER_PARAMETER = 12


@dataclass(frozen=True, kw_only=True)
class TrainerSettings(StabilityRules):
    """How long, how much at once, in which precision, and what happens every so many steps (0: only at the end).

    Batch sizes are in sequences. `replicas` > 1 shards within groups of ranks and replicates across them (HSDP).
    `activation_checkpointing` trades a second forward for activation memory; `loss_chunk` bounds the tokens whose
    vocabulary logits exist at once. `resume` is `auto` (continue from the newest whole checkpoint of run_dir) or
    `never`. The newest `keep_checkpoints` are kept, and those of every `keep_every`th step (0: of none).
    `async_checkpoints` writes them beside the training, from a copy in host memory. A run that does nothing for
    `timeout_s` ends with every rank's stack on stderr. `probe_parts` splits the change of the logits into what the
    query weights, the key weights and everything before them did, for one more forward per probe.
    """

    steps: PositiveInt
    seq_len: PositiveInt
    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt
    precision: Literal["float32", "bfloat16"]
    val_every: NonNegativeInt
    val_sequences: PositiveInt
    probe_every: NonNegativeInt
    probe_sequences: PositiveInt
    checkpoint_every: NonNegativeInt
    keep_checkpoints: PositiveInt = 2
    keep_every: NonNegativeInt = 0
    async_checkpoints: bool = True
    resume: Literal["auto", "never"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    replicas: PositiveInt = 1
    compile: bool = False
    activation_checkpointing: bool = False
    loss_chunk: Annotated[int, Field(gt=0, lt=2**31)] | None = None
    timeout_s: Annotated[float, Field(gt=0, le=1e6)] = 600.0
    probe_parts: bool = False

    def check_ranks(self, ranks: int) -> None:
        """Raise UserError where so many ranks cannot form the replicas or share the batch equally."""
        if ranks % self.replicas:
            raise UserError(f"trainer.replicas={self.replicas} must divide the number of ranks, {ranks}")
        if self.global_batch_size % (ranks * self.micro_batch_size):
            raise UserError(
                f"trainer.global_batch_size={self.global_batch_size} must be a multiple of ranks x "
                f"trainer.micro_batch_size = {ranks} x {self.micro_batch_size} = {ranks * self.micro_batch_size}"
            )
