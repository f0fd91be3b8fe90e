"""The three objectives of the demo's pre-training, as losses on random batches of its text."""

import random
from dataclasses import dataclass

import torch
from sherl_pipe.stages.demo.lexicon import TASKS
from sherl_pipe.stages.demo.noise import cuts, faulty, look_alikes, span_corruption
from sherl_pipe.stages.demo.vocabulary import SENTINELS, whole_words
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, T5ForConditionalGeneration

_IGNORED = -100
_TOKEN_WEIGHT, _SENTENCE_WEIGHT = 10.0, 2.0


@dataclass(frozen=True)
class Losses:
    """One value of each objective."""

    spans: Tensor
    foresight: Tensor
    faults: Tensor


class Objectives(nn.Module):
    """The model with the two small heads that fault spotting needs and nobody keeps."""

    def __init__(
        self,
        model: T5ForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        lines: list[str],
        batch: int,
        prefix_share: float,
        rng: random.Random,
    ) -> None:
        super().__init__()
        self.model, self.batch, self.prefix_share, self.rng = model, batch, prefix_share, rng
        width = model.config.d_model
        self.token_head, self.sentence_head = nn.Linear(width, 1), nn.Linear(width, 1)
        self.lines = _ids(tokenizer, lines)
        self.prefixes = _ids(tokenizer, [f"{task} sentence:" for task in TASKS])
        vocabulary = tokenizer.get_vocab()
        self.sentinels = [vocabulary[token] for token in SENTINELS]
        self.alike = look_alikes(whole_words(tokenizer))
        marks = frozenset(vocabulary[mark] for mark in ",.!")
        digits = frozenset(index for piece, index in vocabulary.items() if piece.isdigit())
        places = ((line, cuts(line, marks, digits)) for line in self.lines)
        self.divisible = [(line, found) for line, found in places if found]
        self.pad, self.end = vocabulary["<pad>"], vocabulary["</s>"]

    def forward(self) -> Losses:
        """The losses of the next three batches."""
        return Losses(self.spans(), self.foresight(), self.faults())

    def spans(self) -> Tensor:
        """T5's span corruption, through encoder and decoder."""
        sources, targets = [], []
        for _ in range(self.batch):
            source, target = span_corruption(self.rng.choice(self.lines), self.sentinels, self.rng)
            sources.append([*self._prefix(), *source, self.end])
            targets.append([*target, self.end])
        ids = _padded(sources, self.pad)
        labels = _padded(targets, _IGNORED)
        loss: Tensor = self.model(
            input_ids=ids, attention_mask=(ids != self.pad).long(), labels=labels
        ).loss
        return loss

    def foresight(self) -> Tensor:
        """The words of the rest of a line, in any order, from the mean state of its start.

        The output embeddings, which are the input's, read the mean state as they read the
        decoder's: so what a sentence says gathers where a linear model finds it.
        """
        sources, rests = [], []
        for _ in range(self.batch):
            line, places = self.rng.choice(self.divisible)
            place = self.rng.choice(places)
            sources.append([*self._prefix(), *line[:place], self.end])
            rests.append(line[place:])
        states, mask = self._encode(sources)
        rest = _padded(rests, _IGNORED)
        table: Tensor = self.model.shared.weight
        scores = _mean(states, mask) @ table.T * table.shape[1] ** -0.5
        chosen = scores.log_softmax(-1).gather(1, rest.clamp(min=0))
        loss: Tensor = -chosen[rest != _IGNORED].mean()
        return loss

    def faults(self) -> Tensor:
        """Where the fault is, from each token's state, and if there is one, from the mean."""
        sources, rows = [], []
        for _ in range(self.batch):
            prefix = self._prefix()
            words, marks = faulty(self.rng.choice(self.lines), self.alike, self.rng)
            sources.append([*prefix, *words, self.end])
            rows.append([0] * len(prefix) + marks)
        states, mask = self._encode(sources)
        truth = _padded(rows, 0).to(states.dtype)
        by_token = functional.binary_cross_entropy_with_logits(
            self.token_head(states).squeeze(-1)[mask], truth[mask]
        )
        by_sentence = functional.binary_cross_entropy_with_logits(
            self.sentence_head(_mean(states, mask)).squeeze(-1), truth.amax(1)
        )
        return _TOKEN_WEIGHT * by_token + _SENTENCE_WEIGHT * by_sentence

    def _prefix(self) -> list[int]:
        return self.rng.choice(self.prefixes) if self.rng.random() < self.prefix_share else []

    def _encode(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        ids = _padded(rows, self.pad)
        mask = ids != self.pad
        states = self.model.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return states, mask


def _ids(tokenizer: PreTrainedTokenizerFast, lines: list[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer(lines, add_special_tokens=False)["input_ids"]
    return found


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


def _padded(rows: list[list[int]], filler: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])
