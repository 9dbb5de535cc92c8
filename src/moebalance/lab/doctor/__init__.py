"""What `moebalance doctor` does: look at a model that is to be trained, or was."""

from moebalance.lab.doctor.diagnosis import Diagnosis, RouterGroup, diagnose
from moebalance.lab.doctor.native_loss import TrainerUse
from moebalance.lab.doctor.text import render
from moebalance.report.diagnosis.finding import Finding, Severity

__all__ = [
    "Diagnosis",
    "Finding",
    "RouterGroup",
    "Severity",
    "TrainerUse",
    "diagnose",
    "render",
]
