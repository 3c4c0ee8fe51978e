"""A run or checkpoint as a model of lm-eval (EleutherAI/lm-evaluation-harness), with the cache of `quack_lm.generate`.

    lm = CheckpointLM(load(Path("runs/mine")), batch_size=8)
    lm_eval.simple_evaluate(lm, tasks=["lambada_openai"])

Scores are those of lm-eval's own model `hf` on the exported directory: the end-of-text token stands before an empty
context alone, and what is longer than `trainer.seq_len` keeps its end. Where documents are masked, a text does not see
that token here, and does there.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from quack_lm.generate import LanguageModel, Sampling, refuse_not_finite

# What lm-eval's own models take where a task does not say it.
MAX_NEW_TOKENS = 256

# ((context, continuation), tokens of the context, tokens of the continuation)
Request = tuple[tuple[str, str] | None, list[int], list[int]]


class CheckpointLM(TemplateLM):
    """A language model of ours for lm-eval."""

    def __init__(self, language_model: LanguageModel, *, batch_size: int = 8) -> None:
        super().__init__()
        self.language_model = language_model
        self.batch_size = batch_size
        self.max_length = int(language_model.trained.config["trainer"]["seq_len"])

    @property
    def eot_token_id(self) -> int:
        """The token between documents."""
        return self.language_model.tokenizer.eot_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text, without special tokens."""
        return self.language_model.tokenizer.encode(string)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text."""
        windows: list[tuple[int, Request]] = []
        for number, (text,) in enumerate(request.args for request in requests):
            rolling = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            windows += [(number, (None, *make_disjoint_window(window))) for window in rolling]
        scores = self._loglikelihood_tokens([request for _, request in windows], disable_tqdm=disable_tqdm)
        sums = [0.0] * len(requests)
        for (number, _), (score, _is_greedy) in zip(windows, scores, strict=True):
            sums[number] += score
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding gives them) of each continuation."""
        model = self.language_model.model
        device = model.embedding.weight.device
        # Long ones first: what does not fit into memory shows at once.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        found: dict[int, tuple[float, bool]] = {}
        for start in tqdm(range(0, len(order), self.batch_size), unit="batch", disable=disable_tqdm):
            batch = order[start : start + self.batch_size]
            rows = [[*requests[i][1], *requests[i][2]][-self.max_length - 1 :] for i in batch]
            inputs = torch.zeros(len(rows), max(map(len, rows)) - 1, dtype=torch.long)
            for row, tokens in zip(inputs, rows, strict=True):
                row[: len(tokens) - 1] = torch.tensor(tokens[:-1])
            with torch.no_grad():
                logits_BTV = model(inputs.to(device))
            for number, i in enumerate(batch):
                end = len(rows[number]) - 1
                n_scored = min(len(requests[i][2]), end)
                targets = torch.tensor(rows[number][end + 1 - n_scored :], device=device)
                scores = logits_BTV[number, end - n_scored : end].float().log_softmax(-1)
                refuse_not_finite(scores)
                is_greedy = bool((scores.argmax(-1) == targets).all())
                found[i] = (scores.gather(-1, targets[:, None]).sum().item(), is_greedy)
        return [found[i] for i in range(len(requests))]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to the first of its stop strings."""
        texts = []
        for context, settings in tqdm([request.args for request in requests], unit="text", disable=disable_tqdm):
            until = settings.get("until") or []
            stops = [until] if isinstance(until, str) else list(until)
            texts.append(self._generate(context, settings, stops))
        return texts

    def _generate(self, context: str, settings: dict[str, Any], stops: Sequence[str]) -> str:
        n_new = int(settings.get("max_gen_toks", MAX_NEW_TOKENS))
        is_drawn = settings.get("do_sample", settings.get("temperature", 0.0) > 0)
        sampling = Sampling(
            temperature=float(settings.get("temperature", 1.0)) if is_drawn else 0.0,
            top_k=settings.get("top_k"),
            top_p=float(settings.get("top_p", 1.0)),
        )
        text = ""
        for (piece,) in self.language_model.stream([context], max_new_tokens=n_new, sampling=sampling):
            text += piece
            if ends := [text.index(stop) for stop in stops if stop and stop in text]:
                return text[: min(ends)]
        return text
