"""Evaluate a checkpoint on tasks of lm-eval (EleutherAI/lm-evaluation-harness).

    quack-lm eval runs/mine --tasks hellaswag,arc_easy                          # needs: network, for their data
    quack-lm eval runs/mine --tasks my_task --include-path tasks/ -o eval.json  # a task of your own, from local files

A run's directory stands for its last valid checkpoint. An exported directory needs none of this: lm_eval --model hf
--model_args pretrained=DIR gives the same numbers, but for a model that masks documents where a text stands behind an
end-of-text token. Needs pip install -e '.[lm-eval]'.
"""

import json
import logging
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from quack_lm.cli.flags import Parser, add_model, check_file, load_model
from quack_lm.errors import UserError, explaining
from quack_lm.files import finite, user_path, write_atomically
from quack_lm.text import echo


def read(arguments: list[str]) -> Namespace:
    """The flags; UserError for a mistake in them."""
    parser = Parser("eval", __doc__)
    add_model(parser, dtype_of="weights")
    add = parser.add_argument
    add("--tasks", required=True, metavar="A,B", help="names of tasks or of groups of them")
    add(
        "--include-path",
        type=user_path,
        metavar="DIR",
        help="where more tasks are, each a yaml file of lm-eval, which may run code",
    )
    add("--num-fewshot", type=int, metavar="N", help="examples in front of each question (the task's own number)")
    add("--limit", type=int, metavar="N", help="only the first N documents of each task")
    add("--batch-size", type=int, default=8, metavar="N", help="sequences of a forward (8)")
    add("-o", "--out", type=user_path, metavar="FILE", help="write the results as JSON")
    options = parser.parse_args(arguments)
    for name, value, least in (
        ("--batch-size", options.batch_size, 1),
        ("--limit", options.limit, 1),
        ("--num-fewshot", options.num_fewshot, 0),
    ):
        if value is not None and value < least:
            raise UserError(f"{name} {value} must be at least {least}")
    if not all(options.tasks.split(",")):
        raise UserError(f"--tasks '{options.tasks}': a name is empty; give names such as --tasks hellaswag,arc_easy")
    check_file(options.out)
    return options


def main(arguments: list[str]) -> int:
    """Evaluate, print the table of lm-eval, and write the results; returns the exit code."""
    options = read(arguments)
    if options.include_path and not options.include_path.is_dir():
        raise UserError(f"--include-path {options.include_path}: no such directory")
    if find_spec("lm_eval") is None:
        raise UserError("quack-lm eval needs lm-eval: pip install -e '.[lm-eval]'")

    # Imported late: --help and a mistake in the flags need not wait for them.
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    from quack_lm.harness import CheckpointLM

    language_model = load_model(options)  # first: tasks take time, and say things
    if language_model.model.eot_id is not None:
        echo("note: this model masks documents, so that no text sees an end-of-text token in front of it", err=True)
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    names, manager = options.tasks.split(","), TaskManager(include_path=options.include_path)
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        broken = broken_yaml(options.include_path) if options.include_path else ""
        raise UserError(f"--tasks {unknown[0]}: lm-eval has no such task{broken}; lm_eval ls tasks lists them")
    tasks: list[Any] = []
    for name in manager.match_tasks(names):
        try:  # the yaml files, and so the errors, are the user's
            loaded = manager.load(name)
        except ConnectionError as error:
            raise UserError(f"--tasks {name}: its data needs a network, or a copy in HF_HOME ({error})") from None
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(
                f"--tasks {name}: lm-eval cannot load it ({reason}); correct that, or choose another"
            ) from None
        tasks += [loaded["groups"][name]] if name in loaded["groups"] else loaded["tasks"].values()
    found = lm_eval.simple_evaluate(
        CheckpointLM(language_model, batch_size=options.batch_size),
        tasks=tasks,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        task_manager=manager,
        log_samples=False,
    )
    assert found is not None, "there is one process"
    echo(*make_table(found).splitlines())
    if options.out:
        with explaining(f"-o {options.out}", "or choose another"):
            options.out.parent.mkdir(parents=True, exist_ok=True)
            kept = {"checkpoint": str(language_model.trained.checkpoint), "results": found["results"]}
            write_atomically(options.out, json.dumps(finite(kept), indent=2) + "\n")
    return 0


def broken_yaml(directory: Path) -> str:
    """What to add about the first file that lm-eval has passed over because it cannot be parsed."""
    for file in sorted(directory.rglob("*.yaml")):
        try:
            yaml.compose(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            return f", and {file} is no YAML ({' '.join(str(error).split())})"
    return ""
