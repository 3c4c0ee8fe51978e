"""Text and values from disk are shown as they are or refused in one line, whatever they are made of.

First `escape` alone, judged by parsers of each medium: CommonMark, which GitHub reads, Python-Markdown, which mkdocs
reads, and HTML. Then the commands, with hostile text and odd values in every file that they read.
"""

import contextlib
import csv
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import markdown as python_markdown
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from calls import call
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from matplotlib.cbook import is_math_text

from quack_lm.config import CONFIG_DIR
from quack_lm.errors import UserError
from quack_lm.files import file_sha256
from quack_lm.paper import claims
from quack_lm.paper import figures as paper_figures
from quack_lm.report import collected, figures, heat, page
from quack_lm.text import escape, one_line, refuse_secret

# What terminals, Markdown, HTML, spreadsheets and matplotlib read as more than characters.
FRAGMENTS = (
    *(
        "\r",
        "\n",
        "\t",
        "\0",
        "\x1b[31m",
        "\x1b]0;x\x07",
        "\x7f",
        "\x85",
        "\x9b",
        "\u200b",
        "\u2028",
        "\u202e",
        "\u2066",
    ),
    *(
        "\ud800",
        "\udcff",
        "\U0010ffff",
        "é🦆",
        "duck",
        "a_b",
        "9",
        " ",
        "    ",
        "'",
        '"',
        "(",
        ")",
        "{",
        "}",
        "[",
        "]",
        "^",
    ),
    *(
        "# ",
        "#",
        "> ",
        "- ",
        "+ ",
        "1. ",
        "2) ",
        "---",
        "===",
        "***",
        "___",
        "```",
        "`",
        "~~~",
        "*x*",
        "__x__",
        "~~x~~",
    ),
    *(
        "![x](http://pond.example/x)",
        "[x](http://pond.example)",
        "[x]: http://pond.example",
        "[x][y]",
        "[^1]: x",
        "[ ] ",
    ),
    *(
        "[1](x)",
        "[0.1, 0.2]",
        "<http://a.example>",
        "http://a.example",
        "www.a.example",
        "root@a.example",
        "<img src=x onerror=alert(1)>",
    ),
    *(
        "</td>",
        "</code>",
        "<script>",
        "</script>",
        "<!--",
        "-->",
        "<![CDATA[",
        "<?x",
        "<",
        "&lt;",
        "&#60;",
        "&",
        "!",
        "|",
    ),
    *(
        "\\",
        "\\|",
        "{: #x onclick=y}",
        "!!! note",
        "??? x",
        ": x",
        "*[x]: y",
        "$x$",
        "$\\frac{$",
        "=1+1",
        "+1",
        "@A(1)",
    ),
)
HOSTILE = (
    st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=5).map("".join)
    | st.text(min_size=1, max_size=20)
    | st.sampled_from(FRAGMENTS).map(lambda text: text * 300)
)


class Elements(HTMLParser):
    """The elements of a page, without paragraphs, and what it shows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, ...]] = []
        self.shown = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen += [] if tag in ("p", "br") else [(tag, *(name for name, _ in attrs))]

    def handle_endtag(self, tag: str) -> None:
        self.seen += [] if tag in ("p", "br") else [("/" + tag,)]

    def handle_data(self, data: str) -> None:
        self.shown += data

    def handle_comment(self, data: str) -> None:
        self.seen.append(("comment",))

    handle_decl = unknown_decl = handle_pi = handle_comment


COMMONMARK = MarkdownIt("commonmark").enable(["table", "strikethrough"])
EXTENSIONS = ["tables", "admonition", "toc", "attr_list", "def_list", "footnotes", "abbr", "pymdownx.superfences"]


def markdown_pages(text: str) -> list[Elements]:
    return [Elements(COMMONMARK.render(text)), Elements(python_markdown.markdown(text, extensions=EXTENSIONS))]


def is_printable(text: str) -> bool:
    """Whether a terminal shows the lines of a text, and does nothing else."""
    return text.replace("\n", "").isprintable()


# ------------------------------------------------------------------------------------------------ each medium

# Wherever the report has untrusted text.
PAGE = "# Sweep {0}\n\n> {1}\n> {2}\n\n## Figures\n\n![{3}](figures/a.png)\n\n- {4}\n- {5}: {6}\n\n" + (
    "| {7} | a |\n| :--- | ---: |\n| {8} | {9} |\n"
)


@given(st.lists(HOSTILE, min_size=10, max_size=10))
@settings(max_examples=100)
def test_hostile_text_makes_no_markdown(texts: list[str]) -> None:
    texts = [text + "x" for text in texts]  # a list without any text, for instance, has another structure
    lines = [escape(text, "markdown") for text in texts]
    assert all(line.isprintable() for line in lines)
    plain, found = (markdown_pages(PAGE.format(*each)) for each in (["duck"] * 10, lines))
    assert [page.seen for page in found] == [page.seen for page in plain]
    for line, text in zip(lines, texts, strict=True):
        for shown in markdown_pages(f"# {line}"):
            assert shown.shown.split() == escape(text).split()  # parsers join spaces


@pytest.mark.parametrize("text", ["root@pond.example", "xmpp:duck@pond.example", "[ ] x", "[x] y"])
def test_links_and_boxes_that_github_alone_makes_are_escaped(text: str) -> None:
    escaped = escape(text, "markdown")
    assert not re.search(r"\w@\w|(?<!\\)\[", escaped)


@given(HOSTILE)
def test_hostile_text_stays_inside_of_a_code_span(text: str) -> None:
    code = escape(text + "x", "markdown code")
    assert code.isprintable()
    for shown in markdown_pages(f"- {code}\n- `a`\n"):
        assert [tag for tag, *_ in shown.seen] == ["ul", *("li", "code", "/code", "/li") * 2, "/ul"]
        assert shown.shown.split()[:-1] == escape(text + "x").split()


@given(HOSTILE)
def test_hostile_text_makes_no_html_formula_or_escape(text: str) -> None:
    for medium in ("terminal", "html", "figure", "csv"):
        assert escape(text, medium).isprintable()
    shown = Elements(f'<p title="{escape(text, "html")}">{escape(text, "html")}</p>')
    assert (shown.seen, shown.shown) == ([], escape(text))
    assert escape(text, "csv")[:1] not in ("=", "+", "-", "@")
    assert not is_math_text(escape(text, "figure"))


def test_what_is_usual_in_a_report_stays_readable_in_its_file() -> None:
    for text in (
        "mha v_dim=16, lr 0.3",
        "+0.021 [+0.010, +0.033]",
        "MLA @ lr 0.3",
        "a < b ~ c (2 of 3)",
        "trainer.seq_len",
        "–",
        "-1.5",
    ):
        assert escape(text, "markdown") == text


@pytest.mark.parametrize(
    "url",
    [
        "https://duck:hunter2@pond.example/x",
        "hf://hunter2@datasets/x",
        "https://pond.example/x?token=hunter2",
        "https://pond.example/x?a=b&access_token=hunter2",
        "https://pond.example/callback#access_token=hunter2&state=1",
        "https://pond.s3.example/x?X-Amz-Credential=hunter2&X-Amz-Signature=hunter2",
        "pond.storage.example/x?GoogleAccessId=duck&Signature=hunter2",
        "https://pond.blob.example/x?sv=2022&sig=hunter2%3D",
        "https://pond.example/v1?key=hunter2",
        "https://pond.example/v1?api_key=hunter2",
        "https://pond.example/login?user=duck&password=hunter2",
        "https://pond.example/x;jwt=hunter2",
        "https://pond.example/x?pass=hunter2",
        "https://pond.example/x?session_id%3Dhunter2",
        "https://pond.example/duck/hf_hunter2hunter2hunter2hunter2hunter2/x",
        "xoxb-17653672481-hunter2",
    ],
)
def test_a_secret_in_a_url_is_refused_and_hidden(url: str) -> None:
    with pytest.raises(UserError, match=r"data\.dir has a password in its URL, or a token.*~/\.netrc") as refused:
        refuse_secret("data.dir", f"['{url}', b]")
    assert "hunter2" not in str(refused.value)
    assert "hunter2" not in one_line(f"cannot read '{url}': no such file")


def test_a_secret_under_an_encoded_name_is_refused() -> None:
    with pytest.raises(UserError, match="logger"):
        refuse_secret("logger.group", "https://pond.example/?%74oken=hunter2")


def test_an_address_without_a_secret_is_none() -> None:
    for url in (
        *("ssh://git@pond.example/duck.git", "git@pond.example:duck.git", "https://pond.example/x?revision=main#part"),
        *("https://pond.example/x?tokenizer=gpt2&max_tokens=5&author=duck", "data/?sky.txt", "a=b&c", "#key"),
    ):
        refuse_secret("data.dir", url)


# ------------------------------------------------------------------------------------------------ sweep directories

# An example takes up to seconds, so it is not made smaller.
SLOW = settings(
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
N_TEXTS = 13
SUMMARY = {
    **{
        "status": "completed",
        "step": 4,
        "tokens": 2048,
        "val_loss": 2.6,
        "best_val_loss": 2.6,
        "initial_val_loss": 6.0,
    },
    **{"max_logit": 4.0, "delta_mean": 0.1, "tokens_per_s": 100.0, "elapsed_s": 2.0, "outside_s": {"probe": 1.0}},
    **{"probes": 2, "checkpoint_step": 4},
}


@contextlib.contextmanager
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def sweep(texts: Sequence[str] = ("duck",) * N_TEXTS) -> dict[str, Any]:
    """The documents of a sweep directory by the names of their files, with these texts wherever a text may be."""
    sweep_name, line, other_line, command, key, value, reason, unstable, fact, *names = texts
    # What a plan may have as the name of a run.
    names = [re.sub("[/\0-\x1f\x7f\ud800-\udfff]", "", f"x{number}{text}")[:40] for number, text in enumerate(names)]
    cells, files = [], {f"{names.pop()}/summary.json": SUMMARY}
    for name, stabilizer, seed, of_data in zip(names, ("none", "quack", "quack"), (0, 0, 1), "aab", strict=True):
        config = {
            "seed": seed,
            "attention": {"_target_": "quack_lm.attention.mha.MHA"},
            "stabilizer": {"_target_": f"quack_lm.stabilizers.{stabilizer}.X", "tau": 0.1, "norm": "spectral"},
            "optimizer": {"_target_": "quack_lm.optim.recipe.Recipe", "lr": 0.3},
            "data": {"_target_": "quack_lm.data.corpus.StdlibCorpus", key: value + of_data},
            "trainer": {"steps": 4, "global_batch_size": 8, "seq_len": 64, "unstable_logit": 3.5},
        }
        cells.append({"name": name, "fingerprint": "0" * 12, "overrides": [f"{key}={value}"], "config": config})
        heads = {"logits/max_per_head": [[1.0, 2.0], [3.0, 4.0]]}
        steps = [{"step": step, "tokens": 512 * step, "val/loss": 3 - step / 10} for step in range(1, 5)]
        files[f"{name}/metrics.jsonl"] = [step | heads for step in steps]
        files[f"{name}/summary.json"] = SUMMARY | {"reason": reason, "unstable": [unstable]}
        files[f"{name}/environment.json"] = {"command": ["x"], "versions": {"torch": "9"}, fact: value, "host": value}
    head = {"sweep": sweep_name, "question": f"{line}\n{other_line}", "command": command}
    return {"plan.json": {**head, "stop": None, "tune_seeds": [], "cells": cells}, **files}


def write(documents: dict[str, Any], place: Path) -> None:
    for name, document in documents.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        lines = document if name.endswith(".jsonl") and isinstance(document, list) else [document]
        (place / name).write_text("\n".join(map(json.dumps, lines)) + "\n")


def assert_shown_or_refused(code: Any, stdout: str, stderr: str) -> None:
    assert is_printable(stdout + stderr)
    errors = [line for line in stderr.splitlines() if not line.startswith("warning: ")]
    assert (code, errors) == (0, []) or (code == 2 and len(errors) == 1 and errors[0].startswith("error: ")), stderr


def pages(place: Path) -> tuple[str, str]:
    """The report without its pictures, which take seconds to draw."""
    found = collected.load(place)
    for make in (figures.plots, paper_figures.plots, heat.heat_maps):
        make(found)
    conclusions = [claims.recipe(found), claims.section(found)]
    return page.as_markdown(found, [], "", conclusions), page.as_html(found, [], "", conclusions)


def structure_of_report(texts: Sequence[str]) -> list[Any]:
    """The elements of both pages of a sweep with these texts, from its runs and again from its collected files."""
    found: list[Any] = []
    with directory() as place:
        write(sweep(texts), place)
        for arguments in (["status", f"dir={place}"], ["collect", f"dir={place}", f"out={place}/collected"]):
            code, stdout, stderr = call("sweep", *arguments)
            assert (code, stderr) == (0, "")
            assert is_printable(stdout)
        assert call("report", str(place), "-o", f"{place}/out") == (0, f"report: {place}/out/report.html\n", "")
        drawn = [(place / "out" / name).read_text() for name in ("report.md", "report.html")]
        for markdown, html in (drawn, pages(place / "collected")):
            assert is_printable(markdown + html)
            found += [*(shown.seen for shown in markdown_pages(markdown)), Elements(html).seen]
        with (place / "collected/results.csv").open(newline="") as file:
            cells = list(csv.reader(file))
        assert all(is_printable(cell) and cell[:1] not in ("=", "+", "@") for row in cells for cell in row)
        return [*found, [len(row) for row in cells]]


@functools.cache
def structure_of_plain_report() -> list[Any]:
    return structure_of_report([f"duck {number}" for number in range(N_TEXTS)])


@given(st.lists(HOSTILE, min_size=N_TEXTS, max_size=N_TEXTS))
@settings(SLOW, max_examples=3)
@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.slow
def test_a_report_of_hostile_texts_has_the_structure_of_one_of_plain_texts(texts: list[str]) -> None:
    # In plan.json, half a surrogate pair is refused; here everything is shown. Each text is another one.
    whole = [f"{text.encode(errors='ignore').decode()} {number}" for number, text in enumerate(texts)]
    assert structure_of_report(whole) == structure_of_plain_report()


ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        "",
        "x",
        "1",
        "0.3",
        "nan",
        "a.b.c",
        "a..b",
        "completed",
        "evil\x1b[31m",
        "=1+1",
        "\r# x\u202e\udcff",
    ),
    *(-1, 0, 1.5, 5e-324, 3e38, 1e308, 2**63 - 1, 2**70, 10**400, float("inf"), float("nan"), "x" * 5000),
    *([], {}, [[]], [None], ["a"], [1, "a"], [[1.0]], [[1, 2], [3]], {"a": 1}, {"_target_": [1]}),
    json.loads("[" * 900 + "]" * 900),
)
KEYS = ("_target_", "a.b", "x\x1b", "\udcff", "run", "status", "train/loss", "logits/max_per_head", "x_json", "=1", "")


def ways(document: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to each value inside of a document."""
    for key in document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ():
        yield (*above, key)
        yield from ways(document[key], (*above, key))


@st.composite
def damaged(draw: st.DrawFn, documents: dict[str, Any]) -> dict[str, Any]:
    """The documents with a value replaced by an odd one, removed, or added."""
    documents = json.loads(json.dumps(documents))
    name = draw(st.sampled_from(sorted(documents)))
    *above, last = draw(st.sampled_from(list(ways(documents[name]))))
    node = functools.reduce(lambda value, key: value[key], above, documents[name])
    kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
    if kind == "remove":
        del node[last]
    else:
        key = draw(st.sampled_from(KEYS)) if kind == "add" and isinstance(node, dict) else last
        node[key] = draw(st.sampled_from(ODD))
    return documents


@given(damaged(sweep() | {"x0duck/stopped_by_rule.json": {"rule": {}}}))
@settings(SLOW, max_examples=100)
def test_an_odd_value_in_a_sweep_directory_is_shown_or_refused(documents: dict[str, Any]) -> None:
    with directory() as place:
        write(documents, place)
        assert_shown_or_refused(*call("sweep", "status", f"dir={place}"))
        result = call("sweep", "collect", f"dir={place}", f"out={place}/collected")
        assert_shown_or_refused(*result)
        if result[0] == 0:
            assert all(map(is_printable, (*pages(place), *pages(place / "collected"))))


def test_a_target_that_names_no_class_is_refused_by_every_command() -> None:
    for odd in ("x", "", None, 3, ["a.b.c"], "a.b c"):
        documents = sweep()
        documents["plan.json"]["cells"][0]["config"]["model"] = {"_target_": odd}
        with directory() as place:
            write(documents, place)
            for command in (
                ["sweep", "status", f"dir={place}"],
                ["sweep", "collect", f"dir={place}"],
                ["report", f"{place}"],
            ):
                code, _, stderr = call(*command)
                assert (code, stderr.count("\n")) == (2, 1)
                assert re.search(r"cells\.0\.config: .*model\._target_=.* is not the name of a class", stderr)


COLUMNS = (
    None,
    True,
    2**62,
    1.5,
    float("nan"),
    1e308,
    "x",
    "evil\x1b[31m",
    b"\xff",
    [1],
    [[1.0]],
    ["a"],
    {"a": 1},
    "[]",
)


@given(st.data())
@settings(SLOW, max_examples=100)
def test_an_odd_column_in_a_collected_file_is_shown_or_refused(data: st.DataObject) -> None:
    with directory() as place:
        write(sweep(), place)
        assert call("sweep", "collect", f"dir={place}")[0] == 0
        (place / "plan.json").unlink()
        path = place / data.draw(st.sampled_from(["results.parquet", "curves.parquet"]))
        table = pq.read_table(path)
        at = data.draw(st.integers(0, table.num_columns - 1))
        column = pa.array([data.draw(st.sampled_from(COLUMNS))] * table.num_rows)
        told = st.sampled_from([*(table.schema.metadata or {}).values(), b"\xff", b"{}", b"[1.5]", b"\x1b[31m"])
        changed = {key: data.draw(told) for key in table.schema.metadata or {}}
        is_told = data.draw(st.booleans())
        odd = (
            table.replace_schema_metadata(changed) if is_told else table.set_column(at, table.column_names[at], column)
        )
        pq.write_table(odd, path)
        with contextlib.suppress(UserError):
            assert all(map(is_printable, pages(place)))


# ------------------------------------------------------------------------------------------------ runs and data sets

SETTINGS = (
    *("experiment=tiny", "stabilizer=quack", "trainer.device=cpu", "logger.progress=false"),
    *("model.n_layers=1", "trainer.val_sequences=2", "trainer.probe_sequences=2", "optimizer.warmup_steps=0"),
)
CHECKPOINT = "run/checkpoints/step_00000002"
FILES = (
    *("run/config.yaml", "run/environment.json", "run/summary.json", "data/manifest.json", "given.yaml"),
    *(f"{CHECKPOINT}/state.json", f"{CHECKPOINT}/manifest.json"),
)
FOLDERS = ("run", "run/checkpoints", CHECKPOINT, "data", "data/tokenizer")
NAMES = ("evil\x1b[31m", "a\nb", "\u202ex", "x" * 200, "-rf", "# h\r", os.fsdecode(b"\xff"), "step_99999999", ".x")


@pytest.fixture(scope="module")
def foreign(tiny_data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, the data set that it was trained on, and its config once more."""
    place = tmp_path_factory.mktemp("foreign")
    shutil.copytree(tiny_data[1].removeprefix("data.dir="), place / "data")
    arguments = [*SETTINGS, f"data.dir={place}/data", "trainer.steps=2", f"run_dir={place}/run"]
    assert call("train", *arguments)[0] == 0
    shutil.copy(place / "run/config.yaml", place / "given.yaml")
    return place


def forge_manifest(checkpoint: Path) -> None:
    """What somebody writes who has changed a checkpoint."""
    paths = [path for path in checkpoint.iterdir() if path.name != "manifest.json"]
    files = {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in paths}
    (checkpoint / "manifest.json").write_text(json.dumps({"files": files}))


@given(st.data())
@settings(SLOW, max_examples=20)
def test_an_odd_value_or_file_in_a_run_or_data_set_is_shown_or_refused(foreign: Path, data: st.DataObject) -> None:
    with directory() as place:
        shutil.copytree(foreign, place, dirs_exist_ok=True)
        name = data.draw(st.sampled_from(FILES))
        documents = data.draw(damaged({name: yaml.safe_load((place / name).read_text())}))
        write(documents, place)  # json, which yaml reads, too
        if data.draw(st.booleans()):
            (place / data.draw(st.sampled_from(FOLDERS)) / data.draw(st.sampled_from(NAMES))).touch()
        if name != f"{CHECKPOINT}/manifest.json":
            forge_manifest(place / CHECKPOINT)
        again = [*SETTINGS, f"data.dir={place}/data", "trainer.steps=4", f"run_dir={place}/run"]
        if name == "given.yaml":
            assert_shown_or_refused(*call("train", f"--config={place}/given.yaml", "--check"))
            again = [f"--config={place}/given.yaml"]
        assert_shown_or_refused(*call("prepare", *again[1:2], *again[:1], f"data.dir={place}/data", "--check"))
        assert_shown_or_refused(*call("train", *again, "--check"))
        code, stdout, stderr = call("preflight", *again)
        errors = [line for line in stderr.splitlines() if not line.startswith("warning: ")]
        assert (code, not errors or stdout == "") in ((0, True), (2, True))
        assert is_printable(stdout + stderr)


@pytest.mark.parametrize("key", ["run_dir", "data.dir", "data.tokenizer", "logger.name"])
@pytest.mark.parametrize("text", ["\ud800x", "a\0b", "x" * 5000, "\x1b[31m\u202e# h\r"])
def test_a_text_that_no_file_can_have_is_shown_or_refused(key: str, text: str, foreign: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((foreign / "given.yaml").read_text()) | {"run_dir": str(tmp_path / "run")}
    section, _, name = key.rpartition(".")
    (config[section] if section else config)[name] = text
    (tmp_path / "file.yaml").write_text(yaml.safe_dump(config))
    for verb in ("train", "prepare"):
        assert_shown_or_refused(*call(verb, f"--config={tmp_path}/file.yaml", "--check"))
    assert is_printable("".join(call("preflight", f"--config={tmp_path}/file.yaml")[1:]))


def real_process(place: Path, package: Path, *arguments: str) -> str:
    """What a command prints in a process of its own, with the libraries' messages."""
    done = subprocess.run(
        [sys.executable, "-m", "quack_lm", *arguments],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(package)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.stdout.decode()


def test_a_library_that_repeats_what_it_has_read_steers_no_terminal(tiny_data: list[str], tmp_path: Path) -> None:
    shutil.copytree(Path(tiny_data[1].removeprefix("data.dir=")) / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer/config.json").write_text(json.dumps({"model_type": "\x1b[31mevil\r\u202e"}))
    (tmp_path / "text.txt").write_text("some words\n" * 99)
    settings = ["data=local", "data.dir=set", "data.files=[text.txt]", "data.tokenizer=tokenizer", "data.workers=0"]
    shown = real_process(tmp_path, CONFIG_DIR.parent, "prepare", *settings, "data.vocab_size=512")
    assert "evil" in shown
    assert is_printable(shown)


@pytest.mark.slow
def test_the_end_of_a_log_steers_no_terminal(tiny_data: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("# Why?\nbase: [experiment=tiny]\ngrid: {stabilizer: [quack]}\n")
    settings = [f"sweep={tmp_path}/mine.yaml", f"dir={tmp_path}/runs", "jobs=1", *tiny_data, "trainer.device=cpu"]
    assert call("sweep", "plan", *settings)[0] == 0
    (cell,) = json.loads((tmp_path / "runs/plan.json").read_text())["cells"]
    place = tmp_path / "runs" / cell["name"]
    place.mkdir()
    (place / "config.yaml").write_text("a: run of somebody else")
    (place / "train.log").write_bytes("\x1b[31mevil\u202e\n".encode() + b"\xff\x9b\n")
    shown = real_process(tmp_path, CONFIG_DIR.parent, "sweep", "run", *settings)
    assert "evil" in shown
    assert is_printable(shown)


def test_the_name_of_a_config_file_steers_no_terminal_and_runs_nothing_in_a_shell(tmp_path: Path) -> None:
    for folder in ("quack_lm", "configs"):
        shutil.copytree(CONFIG_DIR.parent / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("sweep/x$(touch pwned)`touch pwned`", "model/x\n\x1b$(touch pwned)"):
        shutil.copy(tmp_path / "configs/model/tiny.yaml", tmp_path / f"configs/{name}.yaml")
    for arguments in (["train", "--help"], ["train", "model=x"], ["sweep", "plan", "sweep=x"]):
        shown = real_process(tmp_path, tmp_path, *arguments)
        assert "pwned" in shown
        assert is_printable(shown)
    script = real_process(tmp_path, tmp_path, "completion", "bash")
    typed = "COMP_WORDS=(quack-lm sweep ''); COMP_CWORD=2; COMP_LINE='quack-lm sweep '; COMP_POINT=${#COMP_LINE}"
    subprocess.run(["bash", "-c", f"{script}\n{typed}; _quack_lm"], cwd=tmp_path, check=True)
    assert not (tmp_path / "pwned").exists()
