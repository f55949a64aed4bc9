"""How well answers match gold records, and how far their confidences can be trusted."""

from .bootstrap import Clusters, Interval
from .calibration import CALIBRATION_FILE, Calibration, fit_calibration
from .comparison import Comparison, Difference, compare, compare_values
from .counts import SPLITS, AnswerCounts, Counts, DatasetScore, Split
from .matching import Answer, Match
from .reliability import Bin, Reliability, reliability
from .report import GROUPS, ScoreReport
from .scorer import score
from .seen_labels import SeenLabels

__all__ = [
    "CALIBRATION_FILE",
    "GROUPS",
    "SPLITS",
    "Answer",
    "AnswerCounts",
    "Bin",
    "Calibration",
    "Clusters",
    "Comparison",
    "Counts",
    "DatasetScore",
    "Difference",
    "Interval",
    "Match",
    "Reliability",
    "ScoreReport",
    "SeenLabels",
    "Split",
    "compare",
    "compare_values",
    "fit_calibration",
    "reliability",
    "score",
]
