"""Write a trained model as a directory of Hugging Face transformers, with its tokenizer and a model card.

    quack-lm export runs/quickstart/mha-quack-1a2b3c out/mha-quack                      # the newest checkpoint of a run
    quack-lm export runs/mine/checkpoints/step_00000400 out/mine --dtype bfloat16

`AutoModelForCausalLM.from_pretrained(OUT)` loads it without remote code. The class is a stock one where there is one:
Llama for MHA and GQA, Qwen3 for them with QK norm, DeepSeek-V3 for MLA with latent norms, GLM-4.5 for MLA without,
whose down- and up-projections are then multiplied out. For all else it is a class of this package, which
`import quack_lm.hf` registers. The command says which, and why.

A checkpoint of any number of ranks is read tensor by tensor on a CPU. OUT must not exist, and does so only when it is
complete.
"""

import argparse
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quack_lm.cli.flags import Parser, check_writable
from quack_lm.config import identity
from quack_lm.errors import UserError, explaining
from quack_lm.files import read_json, sync_directory, take_lock, user_path, write_atomically, write_json
from quack_lm.text import echo
from quack_lm.training.stop_signals import leaving

if TYPE_CHECKING:
    from quack_lm.training.state import TrainState

LOCK = ".lock"
TOKENIZER_CONFIG = "tokenizer_config.json"


def read(arguments: list[str]) -> argparse.Namespace:
    """What the command line asks for."""
    parser = Parser("export", __doc__)
    parser.add_argument("source", type=user_path, metavar="RUN_OR_CHECKPOINT", help="directory of a run or checkpoint")
    parser.add_argument("out", type=user_path, metavar="OUT", help="the directory to write, which must not exist")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32, exact")
    parser.add_argument(
        "--class", dest="class_", choices=("auto", "quack_lm"), default="auto", help="auto: stock, if any"
    )
    parser.add_argument("--data", type=user_path, metavar="DIR", help="the prepared data (default: the run's data.dir)")
    parser.add_argument("--without-tokenizer", action="store_true", help="export no tokenizer; needs no data")
    parser.add_argument("--license", default="unknown", metavar="ID", help="for the model card, such as apache-2.0")
    options = parser.parse_args(arguments)
    if options.data and options.without_tokenizer:
        raise UserError("--data names the tokenizer, and --without-tokenizer leaves it out; choose one")
    options.license = options.license.lower()
    if not re.fullmatch(r"[a-z0-9.-]+", options.license):
        raise UserError(f"--license {options.license}: give an identifier of Hugging Face, such as apache-2.0 or other")
    return options


def main(arguments: list[str]) -> int:
    """Export one model and return the exit code."""
    options = read(arguments)
    check_new(options.out)

    # Imported late: --help and a mistake need not wait for it.
    import torch

    from quack_lm.data.manifest import TOKENIZER
    from quack_lm.hf.card import Card
    from quack_lm.hf.counterpart import as_it_is, counterpart
    from quack_lm.hf.directory import template, write_config, write_weights
    from quack_lm.training import checkpoint
    from quack_lm.training.build import make_model
    from quack_lm.training.run_dir import RunDir
    from quack_lm.training.trained import find_run_data

    path = checkpoint.find_checkpoint(options.source, str(options.source))
    config, state = checkpoint.read_config(path), checkpoint.read_train_state(path)
    model = make_model(config)
    checkpoint.check_weights(path, model)
    fix = "say where it is with --data DIR, or export --without-tokenizer"
    data = None if options.without_tokenizer else find_run_data(path, config, options.data, fix=fix)
    manifest = data[1] if data else None
    tokenizer_files = [data[0] / TOKENIZER / name for name in data[1].tokenizer.files] if data else []
    chosen = (
        counterpart(model, config)
        if options.class_ == "auto"
        else as_it_is(model, config, "--class quack_lm keeps the weights as they are")
    )
    eot_id = manifest.eot_id if manifest else None
    ids = {"bos_token_id": eot_id, "eos_token_id": eot_id}  # an end-of-text token stands before each document, too
    theirs = template(chosen, {**ids, "max_position_embeddings": config["trainer"]["seq_len"]})
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def read_weight(name: str) -> torch.Tensor:
        return checkpoint.read_weight(path, name, shapes[name])

    dtype, name = getattr(torch, options.dtype), type(theirs).__name__
    with writing(options.out) as staging:
        for file in tokenizer_files:  # which have been compared with the manifest
            shutil.copyfile(file, staging / file.name)
        if (settings_file := staging / TOKENIZER_CONFIG).exists():
            write_json(settings_file, padded(read_json(settings_file), seq_len=config["trainer"]["seq_len"]))
        write_config(staging, theirs, dtype, generation={**ids, "pad_token_id": eot_id})
        files, n_params = write_weights(staging, theirs, chosen, read_weight, dtype)
        card = Card(
            name=options.out.name,
            class_name=name,
            why=chosen.why,
            dtype=options.dtype,
            n_params=n_params,
            n_trained=sum(shape.numel() for shape in shapes.values()),
            config=recorded(config),
            data=manifest.source if manifest else config["data"],
            step=state.step,
            metrics=metrics_of(state, RunDir(path.parents[1]).summary().get("val_tokens_per_byte")),
            license=options.license,
            has_tokenizer=bool(tokenizer_files),
        )
        write_atomically(staging / "README.md", card.markdown())
    echo(f"{path}: step {state.step:,}")
    echo(f"class {name}: {chosen.why}")
    echo(f"{n_params:,} parameters in {options.dtype}, {len(files)} file{'s' if len(files) > 1 else ''} of weights")
    if data and not tokenizer_files:
        echo(f"no tokenizer: {data[0]} has none, for its tokens were made elsewhere")
    echo(f"exported to {options.out}")
    return 0


def padded(settings: dict[str, Any], *, seq_len: int) -> dict[str, Any]:
    """Those of a tokenizer that prepares batches for `generate`, which continues the ends of its rows."""
    length = min(settings.get("model_max_length", seq_len), seq_len)
    return {"pad_token": settings.get("eos_token"), "padding_side": "left", **settings, "model_max_length": length}


def check_new(out: Path) -> None:
    """UserError where there is something already, or nothing can be written."""
    with explaining(str(out), "or choose another directory"):
        if out.exists() or out.is_symlink():
            raise UserError(f"{out} exists already; choose another directory, or remove it")
    check_writable(out, str(out))


def recorded(config: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's config without the settings that it does not have, because they change nothing in the model."""
    sections: dict[str, Any] = {}
    for key, value in identity(config).items():
        section, _, name = key.partition(".")
        (sections.setdefault(section, {}) if name else sections)[name or section] = value
    return sections


@contextmanager
def writing(out: Path) -> Iterator[Path]:
    """A hidden directory beside `out` that gets its name at the end; an export that fails or is stopped leaves nothing.

    What one that was killed has left is removed by the next.
    """
    out = out.absolute()
    staging = out.with_name(f".{out.name}.partial")
    with leaving(), explaining(str(out), "or choose another directory"):
        if staging.is_symlink():
            staging.unlink()
        staging.mkdir(parents=True, exist_ok=True)
        with (staging / LOCK).open("w") as lock:
            if not take_lock(lock):
                raise UserError(f"{out} is being written by another process; wait for it, or choose another directory")
            try:
                for path in staging.iterdir():
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path)
                    elif path.name != LOCK:
                        path.unlink()
                yield staging
                for path in staging.iterdir():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
                sync_directory(staging)
                check_new(out)  # a rename would replace an empty directory
                staging.rename(out)
                (out / LOCK).unlink()
                sync_directory(out.parent)
            finally:
                shutil.rmtree(staging, ignore_errors=True)


def metrics_of(state: "TrainState", val_tokens_per_byte: float | None) -> dict[str, float | None]:
    """What a model card says of the run up to its checkpoint."""
    from quack_lm.training.state import bits_per_byte

    loss = state.val_loss
    return {
        f"validation loss, nats per token (step {state.val_step})": loss,
        "perplexity per token": None if loss is None else math.exp(min(loss, 700.0)),
        "bits per byte of the validation text": (
            None if loss is None or val_tokens_per_byte is None else bits_per_byte(loss, val_tokens_per_byte)
        ),
        "best validation loss": state.best_val_loss,
        "max logit in the last probe": state.max_logit,
    }
