"""Stage three: class and explanation on the device, with numpy and one inference engine."""

from runtime.batching import Batching
from runtime.classifier import Classifier
from runtime.errors import ClearpactError
from runtime.explanations.explanation import Explanation
from runtime.monitor import Monitor
from runtime.prediction import Prediction

__all__ = ["Batching", "Classifier", "ClearpactError", "Explanation", "Monitor", "Prediction"]
