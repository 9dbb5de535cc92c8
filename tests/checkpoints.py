"""Checkpoint folders for the doctor to look at, and how its tests read what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer

import moebalance as mb
from families import tiny
from moebalance.lab.doctor import Diagnosis, Severity
from training import Rows, arguments, light_collections


def texts(diagnosis: Diagnosis, severity: Severity) -> list[str]:
    return [finding.what for finding in diagnosis.findings if finding.severity is severity]


def worst(diagnosis: Diagnosis) -> tuple[Severity, str]:
    return diagnosis.findings[0].severity, diagnosis.findings[0].what


def saved(folder: Path, family: str, biases: Callable[[Tensor], Tensor] | None = None) -> Path:
    """A checkpoint of a tiny model, its selection biases made by `biases` from zeros."""
    model = tiny(family)
    for site in mb.huggingface.find_sites(model):
        if biases is not None and site.bias is not None:
            site.bias.data = biases(site.bias.data)
    model.save_pretrained(folder)
    return folder


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a checkpoint of one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def spread(bias: Tensor) -> Tensor:
    return bias + torch.linspace(-0.1, 0.1, bias.numel()).view_as(bias)


def checkpoint(folder: Path, family: str, method: mb.Method) -> Path:
    """What a Trainer leaves after two steps."""
    callback = mb.huggingface.BalanceCallback(method)
    settings = arguments(folder, max_steps=2, save_strategy="steps", save_steps=2)
    with light_collections():
        Trainer(tiny(family), settings, train_dataset=Rows(8), callbacks=[callback]).train()
    return folder / "checkpoint-2"


def drop_biases(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if "correction" in key]:
        del tensors[key]
