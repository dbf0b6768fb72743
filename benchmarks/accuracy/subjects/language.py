"""How a causal language model is measured.

Each held-out document is cut into windows. On every token of them the model's distribution is compared with the one it had
in FP16: KL divergence, bits, and whether the likeliest token is the same. Then it writes: greedily, compared token by token
with what FP16 writes, and at a temperature, after the first lines of Python functions, to see whether the result parses. The
noise that sampling adds is the same in every row (the Gumbel-max trick), so that rows differ by the model alone.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy.subjects import corpus, metrics
from benchmarks.accuracy.subjects.base import Measured, Subject, pad_to, spread
from examples.code_lm import data

TEMPERATURE = 0.7


@dataclass
class Sample:
    """How much is measured: windows of `length` tokens; prompts of `context` tokens that are continued by `count`.

    Each prompt is continued by sampling, the first `greedy` of them greedily, too.
    """

    windows: int = 96
    length: int = 256
    prompts: int = 24
    greedy: int = 12
    context: int = 96
    count: int = 64
    calibration: int = 64
    batch: int = 8


@dataclass
class LanguageModel(Subject):
    """A causal model and documents. `tokenize` and `detokenize` go between text and tokens."""

    name: str
    model: nn.Module
    vocab: int
    documents: dict[str, bytes]
    kinds: dict[str, Callable[[], dict[str, bytes]]]
    tokenize: Callable[[bytes], list[int]]
    detokenize: Callable[[list[int]], bytes]
    sample: Sample = field(default_factory=Sample)
    loss = "kl"

    def __post_init__(self) -> None:
        sample = self.sample
        self.size = f"{sample.windows} x {sample.length} tokens, {sample.prompts} x {sample.count} written"

    @abstractmethod
    def logits(self, tokens: Tensor) -> Tensor:
        """[B, T] to [B, T, vocab]."""

    @abstractmethod
    def begin(self, tokens: Tensor, count: int) -> tuple[Tensor, Any]:
        """Logits after `tokens` [B, T], and a state from which `count` more tokens can be decoded."""

    @abstractmethod
    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Logits [B, vocab] after one more token each, [B, 1]."""

    @abstractmethod
    def inputs(self, tokens: Tensor) -> dict[str, Any]:
        """The model's keyword arguments for tokens [B, T]."""

    def calibration(self, kind: str) -> Iterator[dict[str, Any]]:
        """Windows of what `kinds` has under that name."""
        windows, _, _ = self._windows(self.kinds[kind](), self.sample.calibration)
        full = windows[(windows != data.PADDING).all(1)]
        return (self.inputs(part) for part in full[:, :-1].split(self.sample.batch))

    def outputs(self, inputs: dict[str, Any]) -> Tensor:
        return self.logits(next(iter(inputs.values())))

    def distance(self, expected: Tensor, outputs: Tensor) -> float:
        return metrics.kl_divergence(expected.log_softmax(-1), outputs).mean().item()

    @torch.inference_mode()
    def reference(self) -> None:
        self.windows, self.document, self.bytes = self._windows(self.documents, self.sample.windows)
        self.expected = [self.logits(part[:, :-1].clamp(min=0)).log_softmax(-1) for part in self._batches()]
        starts = corpus.function_starts(self.documents, 2 * self.sample.context)
        tokenized = [(self.tokenize(text.encode()), header) for text, header in starts]
        tokenized = [(tokens, header) for tokens, header in tokenized if len(tokens) >= self.sample.context]
        chosen = [tokenized[i] for i in spread(len(tokenized), self.sample.prompts)]
        self.headers = [header for _, header in chosen]
        self.prompts = torch.tensor([tokens[-self.sample.context :] for tokens, _ in chosen])
        if not chosen:  # no Python: continue the windows
            self.prompts = self.windows[: self.sample.prompts, : self.sample.context].clamp(min=0)
        self.noise = self._gumbel()
        self.greedy, _ = self._write()

    @torch.inference_mode()
    def measure(self) -> Measured:
        sums = torch.zeros(int(self.document.max()) + 1, 4, dtype=torch.float64)
        for part, expected, document in zip(
            self._batches(), self.expected, self.document.split(self.sample.batch), strict=True
        ):
            targets = part[:, 1:]
            there = targets != data.PADDING
            logits = self.logits(part[:, :-1].clamp(min=0))
            nll = -logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0] / math.log(2)
            agree = (logits.argmax(-1) == expected.argmax(-1)).float()
            values = torch.stack([metrics.kl_divergence(expected, logits), nll, agree, torch.ones_like(nll)], -1)
            sums.index_add_(0, document, (values * there[..., None]).sum(1).double())
        count = sums[:, 3]
        kl, bits, agree = (sums[:, :3].sum(0) / count.sum()).tolist()
        figures = {
            "kl": kl,
            "bits_per_byte": float(sums[:, 1].sum()) / self.bytes,
            "perplexity": 2**bits,
            "top1": agree,
        }
        greedy, sampled = self._write()
        figures["greedy"] = metrics.common_prefix(self.greedy, greedy).mean().item()
        if self.headers:
            texts = [self.detokenize(row).decode(errors="replace") for row in sampled.tolist()]
            judged = [v for v in map(metrics.parses, self.headers, texts) if v is not None]
            figures["judged"] = float(len(judged))
            if judged:
                figures["parses"] = sum(judged) / len(judged)
        return Measured(figures, sums[:, 0] / count, count)

    def _batches(self) -> tuple[Tensor, ...]:
        return self.windows.split(self.sample.batch)

    def _windows(self, documents: dict[str, bytes], wanted: int) -> tuple[Tensor, Tensor, int]:
        """Windows [W, length + 1] from the start of documents, the document of each [W], and how many bytes they predict."""
        length, windows, of, size = self.sample.length, [], [], 0
        names = sorted(documents)
        each = max(1, wanted // len(names))
        chosen = [names[i] for i in spread(len(names), wanted)]
        for number, name in enumerate(chosen):
            tokens = self.tokenize(documents[name][: 16 * each * length])[: each * length + 1]
            size += len(self.detokenize(tokens[1:]))
            for start in range(0, len(tokens) - 1, length):
                piece = torch.tensor(tokens[start : start + length + 1])
                windows.append(pad_to(piece, length + 1, data.PADDING))
                of.append(number)
        return torch.stack(windows), torch.tensor(of), size

    def _gumbel(self) -> Tensor:
        """Noise [count, sequences, vocab] that makes an argmax a sample; none for the greedy sequences, which come first."""
        shape = (self.sample.count, len(self.prompts), self.vocab)
        uniform = torch.rand(shape, generator=torch.Generator().manual_seed(0)).clamp(1e-9, 1 - 1e-7)
        return F.pad(-torch.log(-torch.log(uniform)), (0, 0, min(self.sample.greedy, len(self.prompts)), 0))

    def _write(self) -> tuple[Tensor, Tensor]:
        """Continuations [B, count]: of the first prompts by the likeliest tokens, of all of them by sampling."""
        greedy = self.noise.shape[1] - len(self.prompts)
        logits, state = self.begin(torch.cat([self.prompts[:greedy], self.prompts]), self.sample.count)
        written = []
        for noise in self.noise:
            written.append((logits / TEMPERATURE + noise).argmax(-1, keepdim=True))
            if len(written) < self.sample.count:
                logits, state = self.step(written[-1], state)
        return tuple(torch.cat(written, 1).split([greedy, len(self.prompts)]))
