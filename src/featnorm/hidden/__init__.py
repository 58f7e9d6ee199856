"""The last hidden layer: its hidden classifier, statistics of its units, and explanations of inputs."""

from featnorm.hidden.classifier import HiddenClassifier, margin
from featnorm.hidden.explanation import Explanation, explain
from featnorm.hidden.statistics import ActivationStatistics

__all__ = ["ActivationStatistics", "Explanation", "HiddenClassifier", "explain", "margin"]
