"""Models of other libraries with the sizes of ours: what the suite `peers` compares with.

`transformers` in a plain loop and in its Trainer, `litgpt`, and `torchtitan`, of which the model; all as their users
train them: autocast for bfloat16, their own loss, and AdamW.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from quack_lm.bench.step import LR_FACTOR, Phases, Timing, timed
from quack_lm.config import instantiate
from quack_lm.optim.recipe import Recipe, set_lr
from quack_lm.parallel import World
from quack_lm.training.build import make_model

Loss = Callable[[Tensor], Tensor]  # of tokens [B, T + 1]


def make_peer_step(peer: str, config: dict[str, Any], world: World, directory: Path) -> "PeerStep | TrainerStep":
    """The step of a peer with the sizes of a config."""
    return TrainerStep(config, world, directory) if peer == "llama Trainer" else PeerStep(peer, config, world)


class PeerStep:
    """A step of a peer's model in a plain loop."""

    def __init__(self, peer: str, config: dict[str, Any], world: World) -> None:
        trainer = config["trainer"]
        recipe: Recipe = instantiate(config["optimizer"])
        torch.manual_seed(config["seed"])
        make = {"litgpt": _litgpt, "torchtitan": _torchtitan}.get(peer, partial(_transformers, peer))
        self.model, self.loss = make(config)
        self.model.to(world.device)
        if trainer["compile"]:
            for module in _compiled_parts(self.model):
                module.compile()
        self.optimizers = recipe.build(self.model)
        set_lr(self.optimizers, LR_FACTOR)
        self.max_grad_norm = recipe.max_grad_norm
        self.device = world.device
        self.is_bfloat16 = trainer["precision"] == "bfloat16"
        self.tokens_per_step = trainer["global_batch_size"] * trainer["seq_len"]
        shape = (trainer["micro_batch_size"], trainer["seq_len"] + 1)
        count = trainer["global_batch_size"] // trainer["micro_batch_size"]
        self.micro_batches = [torch.randint(config["model"]["vocab_size"], shape) for _ in range(count)]

    def micro_batch(self) -> Tensor:
        """The first one, on the device."""
        return self.micro_batches[0].to(self.device)

    def turn(self, steps: int) -> Timing:
        """Make so many steps."""
        return timed(self, self.device, steps)

    def __call__(self, phases: Phases) -> None:
        """One step."""
        for host_tokens in self.micro_batches:
            tokens = host_tokens.to(self.device)
            phases.mark("data")
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_bfloat16):
                loss = self.loss(tokens) / len(self.micro_batches)
            phases.mark("forward")
            loss.backward()
            phases.mark("backward")
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        phases.mark("optimizer")


class TrainerStep:
    """The steps of `transformers.Trainer` with a Llama of a config's sizes; a turn is one call of `train`."""

    def __init__(self, config: dict[str, Any], world: World, directory: Path) -> None:
        trainer, optimizer = config["trainer"], config["optimizer"]
        torch.manual_seed(config["seed"])
        self.model, _ = _transformers("llama", config)
        self.world = world
        self.tokens_per_step = trainer["global_batch_size"] * trainer["seq_len"]
        self.data = RandomTokens(config)
        self.arguments = {
            "output_dir": str(directory),
            "per_device_train_batch_size": trainer["micro_batch_size"],
            "gradient_accumulation_steps": trainer["global_batch_size"] // trainer["micro_batch_size"],
            "learning_rate": LR_FACTOR * optimizer["lr"],
            "max_grad_norm": optimizer["max_grad_norm"] or 0.0,
            "bf16": trainer["precision"] == "bfloat16",
            "torch_compile": trainer["compile"],
            "use_cpu": world.device.type == "cpu",
            # Nothing but training, and nothing on the terminal.
            "logging_strategy": "no",
            "save_strategy": "no",
            "eval_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }

    def turn(self, steps: int) -> Timing:
        """Train so many steps after a first one, which also builds the optimizer and the loader."""
        import transformers

        class Clock(transformers.TrainerCallback):
            """When the first step and the last one ended."""

            ends_s: tuple[float, ...] = ()

            def on_step_end(clock, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step in (1, steps + 1):
                    self.world.synchronize()
                    clock.ends_s += (time.perf_counter(),)

        clock = Clock()
        arguments = transformers.TrainingArguments(**self.arguments, max_steps=steps + 1)
        trainer = transformers.Trainer(self.model, arguments, train_dataset=self.data, callbacks=[clock])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        first_s, last_s = clock.ends_s
        return Timing((last_s - first_s) / steps, {})


class RandomTokens(Dataset):
    """Random sequences, as many as a config's batch has; the models shift the labels themselves."""

    def __init__(self, config: dict[str, Any]) -> None:
        trainer = config["trainer"]
        shape = (trainer["global_batch_size"], trainer["seq_len"])
        self.tokens = torch.randint(config["model"]["vocab_size"], shape)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


# ------------------------------------------------------------------------------------------------ models


def _compiled_parts(model: Any) -> list[Any]:
    """What each library compiles: torchtitan its blocks, the others the whole model."""
    return list(model.layers.values()) if hasattr(model, "tok_embeddings") else [model]


def _head_width(config: dict[str, Any]) -> int:
    return config["attention"]["head_dim"] or config["model"]["d_model"] // config["attention"]["n_heads"]


def _litgpt(config: dict[str, Any]) -> tuple[Any, Loss]:
    import litgpt
    from litgpt.utils import chunked_cross_entropy

    sizes, attention = config["model"], config["attention"]
    chosen = litgpt.Config(
        name="quack_lm",
        block_size=config["trainer"]["seq_len"],
        vocab_size=sizes["vocab_size"],
        padded_vocab_size=sizes["vocab_size"],
        n_layer=sizes["n_layers"],
        n_head=attention["n_heads"],
        n_query_groups=attention["n_kv_heads"],
        head_size=_head_width(config),
        n_embd=sizes["d_model"],
        intermediate_size=sizes["d_ff"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    model = litgpt.GPT(chosen)
    if sizes["tied_embeddings"]:
        model.transformer.wte.weight = model.lm_head.weight
    return model, lambda tokens: chunked_cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])


def _torchtitan(config: dict[str, Any]) -> tuple[Any, Loss]:
    from torchtitan.components.loss import cross_entropy_loss
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
    from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock

    sizes, attention = config["model"], config["attention"]
    width, vocab_size = sizes["d_model"], sizes["vocab_size"]
    drawn = {"weight": partial(nn.init.normal_, std=sizes["init_std"])}
    norm = RMSNorm.Config(normalized_shape=width, param_init={"weight": nn.init.ones_})
    heads = make_gqa_config(
        dim=width,
        n_heads=attention["n_heads"],
        n_kv_heads=attention["n_kv_heads"],
        head_dim=_head_width(config),
        wqkv_param_init=drawn,
        wo_param_init=drawn,
        # Its default, FlexAttention with a mask of documents, has no backward pass on a CPU.
        inner_attention=ScaledDotProductAttention.Config(),
        rope=ComplexRoPE.Config(dim=_head_width(config), max_seq_len=config["trainer"]["seq_len"]),
        fuse_qkv=True,
    )
    mlp = make_ffn_config(dim=width, hidden_dim=sizes["d_ff"], w1_param_init=drawn, w2w3_param_init=drawn)
    block = Llama3TransformerBlock.Config(attention_norm=norm, ffn_norm=norm, attention=heads, feed_forward=mlp)
    model = Llama3Model.Config(
        dim=width,
        vocab_size=vocab_size,
        tok_embeddings=Embedding.Config(num_embeddings=vocab_size, embedding_dim=width, param_init=drawn),
        norm=norm,
        lm_head=Linear.Config(in_features=width, out_features=vocab_size, param_init=drawn),
        layers=[block] * sizes["n_layers"],
        enable_weight_tying=sizes["tied_embeddings"],
    ).build()
    model.init_states()

    def loss(tokens: Tensor) -> Tensor:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        return cross_entropy_loss(model(inputs), targets) / targets.numel()

    return model, loss


def _transformers(peer: str, config: dict[str, Any]) -> tuple[Any, Loss]:
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
    if peer == "deepseek_v3":
        ours: Any = make_model(config).attentions[0]  # which knows the widths that the config leaves to it
        n_heads = ours.n_heads
        chosen: Any = transformers.DeepseekV3Config(
            **common,
            q_lora_rank=ours.w_dq.out_features,
            kv_lora_rank=ours.w_dkv.out_features,
            qk_nope_head_dim=ours.qk_width - ours.rope_width,
            qk_rope_head_dim=ours.rope_width,
            v_head_dim=ours.w_uv.out_features // n_heads,
            num_key_value_heads=n_heads,
            first_k_dense_replace=sizes["n_layers"],  # dense layers alone: no experts
        )
        model: Any = transformers.DeepseekV3ForCausalLM(chosen)
    else:
        heads = {"num_key_value_heads": attention["n_kv_heads"], "head_dim": _head_width(config)}
        if peer == "qwen3":
            model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**common, **heads))
        else:
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, **heads))
    # The model shifts its labels itself.
    return model, lambda tokens: model(input_ids=tokens[:, :-1], labels=tokens[:, :-1]).loss
