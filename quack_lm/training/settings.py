"""What the `trainer` section of a config sets."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from quack_lm.attention.scores import MaxLogitKernel
from quack_lm.errors import UserError
from quack_lm.model import ActivationCheckpointing
from quack_lm.training.state import StabilityRules

# Three float32 numbers. In memory: a weight, its gradient and one moment of the optimizer, with the activations on top.
# In a checkpoint: a weight and at most two moments.
BYTES_PER_PARAMETER = 12
# A twentieth of the memory of an 80 GB card, and all blocks of the 1B models in bfloat16.
MAX_KEPT_BYTES = 4 << 30


@dataclass(frozen=True, kw_only=True)
class TrainerSettings(StabilityRules):
    """How long, how much at once, in which precision, and what happens every so many steps (0: only at the end).

    Args:
        steps: optimizer steps of the run.
        seq_len: tokens of a sequence.
        global_batch_size: sequences per step, over all processes.
        micro_batch_size: sequences per forward and process; the rest is gradient accumulation; auto: as many as fit
            into the memory of the device where the run starts.
        precision: precision of the forward and backward, and of the weights that FSDP gathers; master weights are
            float32 in both.
        val_every: steps between validations; 0: only at the end.
        val_sequences: sequences of a validation.
        probe_every: steps between measurements of the logits and of their change by one step; 0: only at the end.
        probe_sequences: sequences of a probe.
        checkpoint_every: steps between checkpoints; 0: only at the end.
        keep_checkpoints: how many of the newest checkpoints are kept.
        keep_every: checkpoints of every so many steps are kept as well; 0: none.
        async_checkpoints: write checkpoints from a copy in host memory while training goes on.
        init_from: begin with the weights of this checkpoint, run directory (its newest checkpoint) or directory of
            transformers, in place of random ones; a run that is continued does not read them again.
        init_stabilizer: with init_from, the reference of a stabilizer that has one, such as QuacK's norms: weights
            takes that of the loaded weights, checkpoint that of the run that init_from is a checkpoint of.
        resume: auto continues from the newest valid checkpoint of run_dir; never refuses a run_dir that holds a run.
        device: where to train; auto: cuda where there is a GPU.
        replicas: more than 1: HSDP, sharded within groups of processes and replicated across so many.
        compile: torch.compile each block and the loss; auto: on a GPU, and on a CPU for runs of at least 1e14 FLOPs per
            process, if there is a compiler.
        activation_checkpointing: recompute the activations of the blocks in the backward instead of keeping them;
            selective: keep the results of attention and of the products with weights, recompute the rest.
        max_logits: how max logits are computed that stabilizer=qk_clip asks for and the backend does not report: matmul
            forms the scores block by block, flex is a forward of FlexAttention, which never writes them (CUDA); auto:
            flex on CUDA where Triton is installed.
        loss_chunk: tokens whose vocabulary logits exist at once; auto: as many as have 2^26 logits, 256 MiB in float32,
            and on a GPU 2^28; null: all.
        reduce_every_micro_batch: reduce the gradients over the ranks after every micro-batch; false: once per step, for
            which each rank holds all of them in reduce_dtype.
        reduce_dtype: precision in which gradients are summed over the ranks, and over micro-batches where
            reduce_every_micro_batch=false.
        reshard_after_forward: whether blocks free their gathered weights after the forward and gather them again for
            the backward, but for the last; auto: where the gathered weights of all blocks take more than 4 GiB.
        deterministic: only deterministic algorithms, which cost speed on GPUs, so that a run repeats bit for bit.
        timeout_s: seconds without progress after which the run ends with the stack of every rank on stderr.
        profile: the first and the last step to trace with torch's profiler, [10, 12], into profile/ of the run
            directory; null: none.
        probe_parts: split the change of the logits into the parts of the query weights, the key weights and everything
            before them, for one more forward per probe.
    """

    steps: PositiveInt
    seq_len: PositiveInt
    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt | Literal["auto"]
    precision: Literal["float32", "bfloat16"]
    val_every: NonNegativeInt
    val_sequences: PositiveInt
    probe_every: NonNegativeInt
    probe_sequences: PositiveInt
    checkpoint_every: NonNegativeInt
    keep_checkpoints: PositiveInt = 2
    keep_every: NonNegativeInt = 0
    async_checkpoints: bool = True
    init_from: str | None = None
    init_stabilizer: Literal["weights", "checkpoint"] = "weights"
    resume: Literal["auto", "never"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    replicas: PositiveInt = 1
    compile: bool | Literal["auto"] = "auto"
    activation_checkpointing: ActivationCheckpointing = False
    max_logits: MaxLogitKernel = "auto"
    loss_chunk: Annotated[int, Field(gt=0, lt=2**31)] | Literal["auto"] | None = "auto"
    reduce_every_micro_batch: bool = True
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    reshard_after_forward: Literal["auto", "always", "never"] = "auto"
    deterministic: bool = False
    timeout_s: Annotated[float, Field(gt=0, le=1e6)] = 600.0
    profile: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None = None
    probe_parts: bool = False

    def __post_init__(self) -> None:
        """Refuse a trace that ends before it begins, or begins after the last step; and settings without effect."""
        if self.init_stabilizer != "weights" and self.init_from is None:
            raise UserError(
                f"trainer.init_stabilizer={self.init_stabilizer} has no effect without trainer.init_from; give it, or "
                "leave it out"
            )
        if self.profile and self.profile[0] > self.profile[1]:
            raise UserError(
                f"trainer.profile={self.profile} must be a first step and a last one, which is not before it"
            )
        if self.profile and self.profile[0] > self.steps:
            raise UserError(
                f"trainer.profile={self.profile} begins after the last step, trainer.steps={self.steps}: nothing would "
                "be traced; give earlier steps, or null"
            )

    def frees_blocks_after_forward(self, n_parameters: int) -> bool:
        """Whether blocks with so many parameters in all free their gathered weights between forward and backward."""
        if self.reshard_after_forward != "auto":
            return self.reshard_after_forward == "always"
        return n_parameters * (2 if self.precision == "bfloat16" else 4) > MAX_KEPT_BYTES

    def is_wrapped(self, ranks: int) -> bool:
        """Whether FSDP wraps the model: one float32 process needs no wrapping, in bfloat16 it gets FSDP's precision."""
        return ranks > 1 or self.precision != "float32"

    @property
    def sequences_at_once(self) -> int:
        """`micro_batch_size` as a number; UserError where it is `auto` still."""
        if self.micro_batch_size == "auto":
            raise UserError("trainer.micro_batch_size=auto is chosen where a run starts; give a number here")
        return self.micro_batch_size

    def held_out_at_once(self, n_sequences: int, *, ranks: int) -> int:
        """The micro-batch of a validation or a probe: no larger than a rank's share, which it would only pad."""
        return min(self.sequences_at_once, math.ceil(n_sequences / ranks))

    def check_ranks(self, ranks: int) -> None:
        """Raise UserError where so many ranks cannot form the replicas or share the batch equally."""
        if ranks % self.replicas:
            raise UserError(f"trainer.replicas={self.replicas} must divide the number of ranks, {ranks}")
        micro_batch_size = 1 if self.micro_batch_size == "auto" else self.micro_batch_size
        at_once = ranks * micro_batch_size
        if self.global_batch_size % at_once:
            # A smaller micro batch computes the same.
            each, rest = divmod(self.global_batch_size, ranks)
            fix = (
                f"trainer.global_batch_size={-(-self.global_batch_size // at_once) * at_once}"
                if rest
                else f"trainer.micro_batch_size={math.gcd(each, micro_batch_size)}"
            )
            raise UserError(
                f"trainer.global_batch_size={self.global_batch_size} must be a multiple of ranks x "
                f"trainer.micro_batch_size = {ranks} x {micro_batch_size} = {at_once}; for example {fix}"
            )
