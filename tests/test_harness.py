"""A checkpoint in lm-eval, on local tasks, against the numbers of the evaluation during training."""

import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from calls import call

from quack_lm.config import compose
from quack_lm.training.build import build_run
from quack_lm.training.check import check_run
from quack_lm.training.evaluation import SHIPPED
from quack_lm.training.loop import train

SMALL = ["experiment=tiny", "model.d_model=32", "model.n_layers=2", "model.n_heads=2", "model.d_ff=48"]
SMALL += ["model.vocab_size=512", "trainer.seq_len=32", "trainer.micro_batch_size=2", "trainer.global_batch_size=4"]
SMALL += ["trainer.val_sequences=2", "trainer.probe_sequences=2", "logger.progress=false", "trainer.device=cpu"]

CHOICE = """\
task: pond_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
TEXT = """\
task: pond_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{{metric: bits_per_byte}}]
"""
GENERATE = """\
task: pond_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: context
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="pip install -e '.[lm-eval]'")
@pytest.mark.parametrize("attention", ["mha", "mla"])
def test_lm_eval_finds_what_the_run_has_logged(
    attention: str, tmp_path: Path, tiny_data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval
    import lm_eval.tasks

    # Without the thousands of lm-eval's own tasks, whose index takes 7 s.
    manager = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    run_dir = tmp_path / "run"
    settings = [*SMALL, *tiny_data, f"attention={attention}", "stabilizer=qk_norm", "eval.every=20", "trainer.steps=40"]
    train(build_run(check_run(compose([*settings, f"run_dir={run_dir}"]))))
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name, text in (("choice", CHOICE), ("text", TEXT), ("generate", GENERATE)):
        source = "tiny_text" if name == "text" else "tiny_choice"
        (tasks / f"{name}.yaml").write_text(text.format(file=SHIPPED / f"{source}.jsonl"))
    names = "pond_choice,pond_text,pond_generate"
    out = tmp_path / "out.json"
    code, stdout, stderr = call(
        "eval", str(run_dir), "--tasks", names, "--include-path", str(tasks), "--batch-size", "3", "-o", str(out)
    )
    assert code == 0, stderr
    assert "pond_choice" in stdout
    found = json.loads(out.read_text())["results"]
    assert found["pond_choice"]["acc,none"] == last["eval/tiny_choice/accuracy"]
    assert found["pond_choice"]["acc_norm,none"] == last["eval/tiny_choice/accuracy_norm"]
    assert found["pond_text"]["bits_per_byte,none"] == pytest.approx(last["eval/tiny_text/bits_per_byte"], rel=1e-5)
    if attention == "mla":  # that each exported class computes the same is in test_export.py
        (tasks / "text.yaml").write_text(TEXT.format(file=tmp_path / "gone.jsonl"))
        (tasks / "choice.yaml").write_text("task: [")
        for name, words in (("text", "gone.jsonl"), ("choice", f"{tasks}/choice.yaml is no YAML")):
            refused = call("eval", str(run_dir), "--tasks", f"pond_{name}", "--include-path", str(tasks))
            assert refused[:2] == (2, "")
            assert words in refused[2].splitlines()[-1]
        return
    # The exported directory in lm-eval's own model.
    assert call("export", str(run_dir), str(tmp_path / "exported"))[0] == 0
    theirs = lm_eval.simple_evaluate(
        "hf",
        model_args={"pretrained": str(tmp_path / "exported"), "device": "cpu", "max_length": 32},
        tasks=names.split(","),
        task_manager=manager(include_path=tasks),
        batch_size=3,
        log_samples=False,
    )
    for name, metric in (("choice", "acc"), ("choice", "acc_norm"), ("generate", "exact_match")):
        assert theirs["results"][f"pond_{name}"][f"{metric},none"] == found[f"pond_{name}"][f"{metric},none"]
    bits = theirs["results"]["pond_text"]["bits_per_byte,none"]
    assert bits == pytest.approx(found["pond_text"]["bits_per_byte,none"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x"], "--tasks"),
        (["x", "--tasks", "a", "--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["x", "--tasks", "a", "--limit", "0"], "--limit 0 must be at least 1"),
        (["x", "--tasks", "a", "--num-fewshot", "-1"], "--num-fewshot -1 must be at least 0"),
        (["x", "--tasks", "a,"], "--tasks 'a,': a name is empty"),
        (["x", "--tasks", "a", "-o", f"{__file__}/out"], "test_harness.py is not a writable directory"),
        (["x", "--tasks", "a", "--include-path", "no/where"], "no such directory"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], words: str) -> None:
    code, stdout, stderr = call("eval", *arguments)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert words in stderr
