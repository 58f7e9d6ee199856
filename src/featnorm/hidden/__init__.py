"""The last hidden layer: its hidden classifier, statistics of its units, and explanations of inputs."""

from featnorm.hidden.classifier import HiddenClassifier, margin
from featnorm.hidden.examples import Examples
from featnorm.hidden.explanation import Explanation, Why, explain
from featnorm.hidden.statistics import ActivationStatistics

__all__ = ["ActivationStatistics", "Examples", "Explanation", "HiddenClassifier", "Why", "explain", "margin"]
