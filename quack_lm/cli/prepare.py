"""Turn text into the token shards that training reads.

    quack-lm prepare [key=value ...]

The source is the `data` section of the config, in the same words that train.py takes; everything else has defaults:

    # Python's own standard library: about 11 MB, nothing to download
    quack-lm prepare data=stdlib

    # the paper's data, from the Hugging Face hub, with eight processes
    quack-lm prepare data=cosmopedia_v2 data.workers=8

    # ... or from copies of its files
    quack-lm prepare data=cosmopedia_v2 'data.files=[/copies/*.parquet]' data.tokenizer=/copies/tokenizer

    # files of your own: text (a document is a file), jsonl or parquet (a document is a row)
    quack-lm prepare data=local data.dir=data/notes 'data.files=[notes/**/*.md]' data.vocab_size=4096
    quack-lm prepare data=local data.format=jsonl data.text_field=body 'data.files=[posts.jsonl]'

What most people set: data.dir (where the shards go), data.tokenizer (a transformers tokenizer, directory or hub name;
null trains a byte-level BPE of data.vocab_size entries), data.val_fraction, data.probe_fraction, data.workers.
All of it, with comments: configs/data/*.yaml and quack_lm/data/corpus.py.

Other flags:
    --config FILE   take the settings from the config.yaml of a run; key=value still overrides
    --check         check the settings, and that the files are there; prepare nothing

An interrupted preparation goes on where it was when the same command is given again; a finished one is left alone.
"""

import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Prepare the data set that the arguments describe and print what is in it."""
    if "-h" in arguments or "--help" in arguments:
        print(__doc__)
        return 0
    # Worker processes import this file again; they need none of this.
    from quack_lm.config import compose, instantiate, read_flags
    from quack_lm.data.prepare import is_prepared, prepare

    file, is_check, overrides = read_flags(arguments)
    corpus = instantiate(compose(overrides, file=file)["data"])
    if is_check:
        print(f"{corpus.dir} is {'prepared already' if is_prepared(corpus) else 'ready to be prepared'}")
        return 0
    try:
        directory = prepare(corpus)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from here", file=sys.stderr)
        return 130
    print_contents(directory)
    return 0


def print_contents(directory: Path) -> None:
    """One line for each split."""
    from quack_lm.data.manifest import SPLITS, TokenData

    manifest = TokenData.open(directory, verify_checksums=False).manifest
    print(f"{directory}: {manifest.vocab_size} vocabulary, unigram entropy {manifest.unigram_entropy:.3f} nats/token")
    print(f"{'split':<6} {'documents':>12} {'tokens':>16} {'shards':>7}")
    for name in SPLITS:
        split = manifest.split(name)
        print(f"{name:<6} {split.documents:>12,} {split.tokens:>16,} {len(split.shards):>7,}")
