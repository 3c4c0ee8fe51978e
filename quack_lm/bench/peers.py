"""Models of `transformers` of the same sizes, trained in a plain loop: what the suite `peers` compares with."""

from typing import Any

import torch
from torch import Tensor, nn

from quack_lm.bench.step import Phases, TrainingStep
from quack_lm.bench.suites import PEERS
from quack_lm.config import instantiate
from quack_lm.errors import UserError
from quack_lm.optim.recipe import Recipe, set_lr
from quack_lm.parallel import World
from quack_lm.training.build import make_model


def make_step(name: str, config: dict[str, Any], world: World) -> "TrainingStep | PeerStep":
    """The step of a variant: our own, or a peer's where it is one's name."""
    return PeerStep(name, config, world) if name in PEERS else TrainingStep(config, world)


class PeerStep:
    """A step of a model of `transformers` as its users make it: autocast for bfloat16, its own loss, and AdamW."""

    def __init__(self, name: str, config: dict[str, Any], world: World) -> None:
        if world.size > 1:
            raise UserError("suite=peers compares models in one process; start it without torchrun")
        trainer = config["trainer"]
        recipe: Recipe = instantiate(config["optimizer"])
        torch.manual_seed(config["seed"])
        self.model = _model(name, config).to(world.device)
        if trainer["compile"] is True:
            self.model.compile()
        self.optimizers = recipe.build(self.model)
        set_lr(self.optimizers, 1e-3)
        self.max_grad_norm = recipe.max_grad_norm
        self.device = world.device
        self.is_bfloat16 = trainer["precision"] == "bfloat16"
        self.tokens_per_step = trainer["global_batch_size"] * trainer["seq_len"]
        shape = (trainer["micro_batch_size"], trainer["seq_len"])
        count = trainer["global_batch_size"] // trainer["micro_batch_size"]
        self.micro_batches = [torch.randint(config["model"]["vocab_size"], shape) for _ in range(count)]

    def __call__(self, phases: Phases) -> None:
        """One step."""
        for host_tokens in self.micro_batches:
            tokens: Tensor = host_tokens.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_bfloat16):
                loss = self.model(input_ids=tokens, labels=tokens).loss / len(self.micro_batches)
            phases.mark("forward")
            loss.backward()
            phases.mark("backward")
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        phases.mark("optimizer")


def _model(name: str, config: dict[str, Any]) -> Any:
    import transformers

    sizes, attention = config["model"], config["attention"]
    common = {
        "vocab_size": sizes["vocab_size"],
        "hidden_size": sizes["d_model"],
        "intermediate_size": sizes["d_ff"],
        "num_hidden_layers": sizes["n_layers"],
        "num_attention_heads": attention["n_heads"],
        "tie_word_embeddings": sizes["tied_embeddings"],
        "max_position_embeddings": config["trainer"]["seq_len"],
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    if name == "deepseek_v3":
        ours: Any = make_model(config).attentions[0]  # which knows the widths that the config leaves to it
        n_heads = ours.n_heads
        chosen = transformers.DeepseekV3Config(
            **common,
            q_lora_rank=ours.w_dq.out_features,
            kv_lora_rank=ours.w_dkv.out_features,
            qk_nope_head_dim=ours.qk_width - ours.rope_width,
            qk_rope_head_dim=ours.rope_width,
            v_head_dim=ours.w_uv.out_features // n_heads,
            num_key_value_heads=n_heads,
            first_k_dense_replace=sizes["n_layers"],  # dense layers alone: no experts
        )
        return transformers.DeepseekV3ForCausalLM(chosen)
    width = attention["head_dim"] or sizes["d_model"] // attention["n_heads"]
    heads = {"num_key_value_heads": attention["n_kv_heads"], "head_dim": width}
    if name == "qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**common, **heads))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, **heads))
