"""Turn text into the token shards that training reads.

    quack-lm prepare data=CHOICE [key=value ...]

The choices:

{choices}

Examples:

    quack-lm prepare data=stdlib                          # about 15 s on a laptop
    quack-lm prepare data=cosmopedia_v2 data.workers=16   # on a machine with a network and 16 cores

    # the same from copies of its files
    quack-lm prepare data=cosmopedia_v2 'data.files=[/copies/*.parquet]' data.tokenizer=/copies/tokenizer

    # your own files: text (a document is a file), jsonl or parquet (a document is a row)
    quack-lm prepare data=local data.dir=data/notes 'data.files=[notes/**/*.md]' data.vocab_size=4096
    quack-lm prepare data=local data.dir=data/book 'data.files=[book.txt]' data.separator=blank_lines
    quack-lm prepare data=local data.text_field=body 'data.files=[posts.jsonl]'

    # any data set of the hub, and tokens that another program has made
    quack-lm prepare data=hub data.name=OWNER/NAME data.dir=data/name
    quack-lm prepare data=tokens 'data.files=[train_*.bin]' data.vocab_size=50257 data.eot_id=50256

What most people set: data.dir (where the shards go), data.tokenizer (a transformers tokenizer, directory or hub name;
null trains a byte-level BPE of data.vocab_size entries), data.val_fraction, data.probe_fraction, data.workers;
for own files data.separator (where documents end inside of a text file) and data.on_bad_record=skip.
All keys, with comments: configs/data/*.yaml and quack_lm/data/corpus.py.

Flags:
    --config FILE   take the data settings from the config.yaml of a run; key=value still overrides
    --check         check the settings and that the input files exist; prepare nothing
    -h, --help      this text

An interrupted preparation continues when the same command is given again; a finished one is left alone.
"""

from pathlib import Path

from quack_lm.text import echo


def main(arguments: list[str]) -> int:
    """Prepare the data set that the arguments describe and print its sizes."""
    # Imported late: worker processes import this module and need none of these.
    from quack_lm.config import compose, instantiate, read_flags
    from quack_lm.data.corpus import Corpus
    from quack_lm.data.prepare import directory_errors, is_prepared, prepare
    from quack_lm.errors import UserError, exit_without_teardown

    if {"-h", "--help"} & set(arguments):
        echo(*(__doc__ or "").replace("{choices}", data_choices()).splitlines())
        return 0
    file, is_check, overrides = read_flags(arguments)
    # The default of train is the paper's data: nobody should start to download that without having asked for it.
    if file is None and not any(override.startswith(("data=", "experiment=")) for override in overrides):
        echo("The choices of data:", "", *data_choices().splitlines(), "")
        raise UserError("no data chosen; for the smallest, which needs no download: quack-lm prepare data=stdlib")
    if "data=mixture" in overrides:
        raise UserError("data=mixture is for training: prepare each of its data.dirs by itself")
    config = compose(overrides, file=file, reads_manifest=False)
    corpus = instantiate(config["data"])
    if not isinstance(corpus, Corpus):
        raise UserError(f"--config {file} is of a run on a mixture: prepare each of its data.dirs by itself")
    if is_check:
        with directory_errors(corpus):
            state = "prepared already" if is_prepared(corpus) else "not prepared yet; its settings are valid"
        echo(f"{corpus.dir} is {state}")
        return 0
    try:
        directory = prepare(corpus)
    except KeyboardInterrupt:
        echo("", "interrupted; the same command continues from here", err=True)
        exit_without_teardown(130)  # a library that trains a tokenizer would be waited for
    print_sizes(directory)
    return 0


def data_choices() -> str:
    """A line for each choice of `data=`: the comment that its yaml begins with."""
    from quack_lm.config import CONFIG_DIR, choices

    files = {name: CONFIG_DIR / "data" / f"{name}.yaml" for name in choices("data")}
    comments = {name: path.read_text().partition("\n")[0].removeprefix("# ") for name, path in files.items()}
    return "\n".join(f"    data={name:15} {comment}" for name, comment in comments.items())


def print_sizes(directory: Path) -> None:
    """Print the documents, tokens and shards of each split."""
    from tqdm import tqdm

    from quack_lm.data.manifest import SPLITS, TokenData

    manifest = TokenData.open(directory, verify_checksums=False).manifest
    echo(f"{directory}: {manifest.vocab_size} vocabulary, unigram entropy {manifest.unigram_entropy:.3f} nats/token")
    echo(f"{'split':<6} {'documents':>12} {'tokens':>8} {'size':>8} {'shards':>7}")
    for name in SPLITS:
        split = manifest.split(name)
        n_bytes = split.tokens * manifest.token_dtype.itemsize
        tokens, size = tqdm.format_sizeof(split.tokens), tqdm.format_sizeof(n_bytes, "B")
        echo(f"{name:<6} {split.documents:>12,} {tokens:>8} {size:>8} {len(split.shards):>7,}")
