"""What training and calibration may be asked for, apart from what does it; torch is not needed to read it."""

# Bits of a network that is not quantized, and of those that are.
FLOAT_BITS = 32
QUANTIZED_BITS = (2, 3, 4, 5, 6, 7, 8)
# How alpha is searched for after training: least squared error, a percentile, or the better of both.
MSE = "mse"
SEARCHES = (MSE, "percentile", "best")
# Training images that calibration looks at, unless told otherwise.
CALIBRATION_SAMPLES = 512
