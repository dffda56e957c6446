"""Scoring answers, continual-learning metrics, and the report of a run.

predictions = evaluate(mllm, task.test, scorer=task.scorer)
report = Report.load("runs/mr_lora")
write_report(["runs/mr_lora", "runs/finetune"], "comparison.html")
"""

from .evaluator import check_batching, check_scorers, evaluate
from .matrix import AccuracyMatrix
from .metrics import METRICS, bootstrap, compute_metrics, value
from .predictions import (
    Prediction,
    diagnose,
    mean_scores,
    read_predictions,
    router_confusion,
    write_predictions,
)
from .report import write_report
from .run_report import Report
from .scorers import SCORERS, scorer

__all__ = [
    "METRICS",
    "SCORERS",
    "AccuracyMatrix",
    "Prediction",
    "Report",
    "bootstrap",
    "check_batching",
    "check_scorers",
    "compute_metrics",
    "diagnose",
    "evaluate",
    "mean_scores",
    "read_predictions",
    "router_confusion",
    "scorer",
    "value",
    "write_predictions",
    "write_report",
]
