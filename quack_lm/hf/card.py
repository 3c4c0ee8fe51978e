"""The model card of an exported directory: what was trained, on what, how well; how to load it and how to cite it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from quack_lm import __version__
from quack_lm.config import choice
from quack_lm.text import escape

CITATION = """\
@article{anson2025controlling,
  title   = {Controlling changes to attention logits},
  author  = {Anson, B. and Aitchison, L.},
  journal = {arXiv preprint arXiv:2511.21377},
  year    = {2025},
  url     = {https://arxiv.org/abs/2511.21377}
}"""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a model card says; every text in it may be untrusted."""

    name: str
    class_name: str  # of transformers
    why: str  # that class
    dtype: str
    n_params: int  # of the exported tensors
    n_trained: int  # of the model that was trained
    config: Mapping[str, Any]  # of the run, by section
    data: Mapping[str, Any]  # what it was trained on
    step: int
    metrics: Mapping[str, float | None]
    license: str
    has_tokenizer: bool

    @property
    def tokens(self) -> int:
        """Tokens of training up to the checkpoint."""
        return self.step * self.config["trainer"]["global_batch_size"] * self.config["trainer"]["seq_len"]

    def markdown(self) -> str:
        """The README.md."""
        attention, stabilizer = choice(self.config["attention"]), choice(self.config["stabilizer"])
        is_ours = self.class_name.startswith("QuackLM")
        head = {
            "license": self.license,
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["quack_lm", attention, stabilizer],
        }
        imports = ["import quack_lm.hf  # pip install quack-lm"] if is_ours else []
        classes = "AutoModelForCausalLM, AutoTokenizer" if self.has_tokenizer else "AutoModelForCausalLM"
        use = [*imports, f"from transformers import {classes}", ""]
        use += ['model = AutoModelForCausalLM.from_pretrained("DIRECTORY")']
        use += ['tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")'] if self.has_tokenizer else []
        n_params = f"{self.n_trained:,} parameters"
        if self.n_params != self.n_trained:
            n_params += f" ({self.n_params:,} in the tensors of this directory)"
        masked = (
            " In training, attention stayed within a document; transformers does so only where each document is a "
            "sequence of its own."
            if self.config["data"]["mask_documents"]
            else ""
        )
        parts = [
            f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
            f"# {escape(self.name, 'markdown')}",
            f"A language model of {n_params}, pretrained with quack_lm {__version__}: attention `{attention}`, "
            f"stabilizer `{stabilizer}`, {self.step:,} steps, {self.tokens:,} tokens.",
            "## How to use",
            _fenced("\n".join(use), "python"),
            f"The class is `{self.class_name}`, in {self.dtype}: {escape(self.why, 'markdown')}.{masked}",
            "## Metrics",
            self._table(),
            "## Data",
            _fenced(_yaml(self.data), "yaml"),
            "## Stabilizer",
            _fenced(_yaml(self.config["stabilizer"]), "yaml"),
            "## Configuration",
            _fenced(_yaml(self.config), "yaml"),
            "## License",
            f"{'Not stated' if self.license == 'unknown' else self.license}, by whoever exported the model. The data's "
            "license may add terms.",
            "## Citation",
            _fenced(CITATION, "bibtex"),
        ]
        return "\n\n".join(parts) + "\n"

    def _table(self) -> str:
        rows = [f"| {name} | {value:.4f} |" for name, value in self.metrics.items() if value is not None]
        return "\n".join([f"| at step {self.step:,} | |", "|---|---|", *rows])


def _yaml(section: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(section), sort_keys=False, width=100).rstrip()


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
