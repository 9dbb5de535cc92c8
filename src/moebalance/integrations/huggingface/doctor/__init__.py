"""What `moebalance doctor` does: look at a model that is to be trained, or was."""

from moebalance.integrations.huggingface.doctor.diagnosis import Diagnosis, RouterGroup, diagnose
from moebalance.integrations.huggingface.doctor.native_loss import TrainerUse
from moebalance.integrations.huggingface.doctor.text import render
from moebalance.integrations.huggingface.doctor.weights import Finding, Severity

__all__ = [
    "Diagnosis",
    "Finding",
    "RouterGroup",
    "Severity",
    "TrainerUse",
    "diagnose",
    "render",
]
