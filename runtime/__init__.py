"""Stage three: class and explanation on the device, with numpy and one inference engine."""

from runtime.batching import Batching
from runtime.classifier import Classifier, Prediction
from runtime.errors import ClearpactError
from runtime.explanation import Explanation
from runtime.monitor import Monitor

__all__ = ["Batching", "Classifier", "ClearpactError", "Explanation", "Monitor", "Prediction"]
