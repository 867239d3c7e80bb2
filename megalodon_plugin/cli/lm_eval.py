"""Megalodon under EleutherAI's lm-evaluation-harness (`pip install 'megalodon-plugin[lm-eval]'`).

    python -m megalodon_plugin.cli.lm_eval --model megalodon --model_args pretrained=CHECKPOINT --tasks ...

is the harness's own command, which knows the models that were imported before it starts. Contexts have no longest
length: long ones are read in pieces with a carried state.
"""

from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from torch import Tensor

from megalodon_plugin.model.inference.generate import Decoding, continue_from
from megalodon_plugin.model.inference.prefill import PIECE_TOKENS, prefill
from megalodon_plugin.model.inference.sampling import Sampling
from megalodon_plugin.model.inference.scoring import SLICE_TOKENS
from megalodon_plugin.model.precision import DTYPES

from .continuations import end_tokens, tokens_of_both


@register_model("megalodon")
class MegalodonLM(LM):
    """A checkpoint of any format as the harness's language model.

    Args:
        pretrained: the checkpoint's folder.
        dtype: "float32" or "bfloat16", by default the latter on a GPU.
        device: by default the GPU if there is one.
        batch_size: accepted as the harness passes it; rows are scored one by one.
        tokenizer: instead of the one that the checkpoint names.
        max_gen_toks: where a task does not say how many tokens to generate.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        tokenizer: str | None = None,
        max_gen_toks: int = 256,
        **_: Any,
    ) -> None:
        super().__init__()
        from megalodon_plugin.titan.load_model import load_checkpoint

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
        if dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, but is {dtype!r}")
        self.model, self.tokenizer = load_checkpoint(Path(pretrained), device, DTYPES[dtype], tokenizer)
        self._device, self._max_gen_toks = torch.device(device), max_gen_toks

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): log P(continuation | context), and whether greedy decoding gives it."""
        answers = []
        for context, continuation in (request.args for request in requests):
            # A blank between the two belongs to the continuation's first token.
            kept = context.rstrip() if context.strip() else context
            prefix = self._encode(kept)
            whole = self._encode(context + continuation)
            n_prefix = min(len(prefix), len(whole) - 1)
            answers.append(self._score(whole, n_prefix))
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """For each text its log-likelihood, every token given all before it."""
        return [self._score(self._encode(request.args[0]), 1)[0] for request in requests]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """For each (context, options) the text up to the first of the stop strings `until`."""
        return [self._generate(*request.args) for request in requests]

    def _encode(self, text: str) -> list[int]:
        """Tokens behind the begin token; where there is none, behind the end token."""
        first = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else self.tokenizer.eos_id
        return [*([] if first is None else [first]), *self.tokenizer.encode(text, add_bos=False, add_eos=False)]

    @torch.no_grad()
    def _score(self, tokens: list[int], n_prefix: int) -> tuple[float, bool]:
        """Sum of log-likelihoods of tokens[n_prefix:], and whether each is the likeliest."""
        text = torch.tensor(tokens, device=self._device)
        n_prefix = max(n_prefix, 1)
        if len(text) <= n_prefix:
            return 0.0, True
        state = prefill(self.model, [text[: n_prefix - 1]]).state if n_prefix > 1 else None
        total, greedy = 0.0, True
        inputs, targets = text[n_prefix - 1 : -1], text[n_prefix:]
        for piece, wanted in zip(inputs.split(PIECE_TOKENS), targets.split(PIECE_TOKENS), strict=True):
            features, state = self.model.stream(piece.unsqueeze(0), state)
            for x, t in zip(features[0].split(SLICE_TOKENS), wanted.split(SLICE_TOKENS), strict=True):
                found, same = _likelihoods(self.model.logits(x), t)
                total, greedy = total + found, greedy and same
        return total, greedy

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else until
        temperature = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
        n_new = int(options.get("max_gen_toks", self._max_gen_toks))
        prefilled = prefill(self.model, [torch.tensor(self._encode(context), device=self._device)])
        stops = end_tokens(self.tokenizer)
        n_tokens = tokens_of_both(self.model, self.tokenizer)
        decoding = Decoding(n_new, Sampling(temperature=temperature), n_tokens, stops)
        new: list[int] = []
        text = ""
        for token in continue_from(self.model, prefilled, decoding):
            if int(token) in stops:
                break
            new.append(int(token))
            text = self.tokenizer.decode(new)
            if any(stop in text for stop in until):
                break
        ends = [text.index(stop) for stop in until if stop in text]
        return text[: min(ends, default=len(text))]


def _likelihoods(logits: Tensor, targets: Tensor) -> tuple[float, bool]:
    chosen = logits.log_softmax(-1).gather(1, targets.unsqueeze(1))
    return float(chosen.double().sum()), bool((logits.argmax(-1) == targets).all())


def main() -> None:
    """The harness's command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
