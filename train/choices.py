"""What training and calibration may be asked for, apart from what does it; torch is not needed to read it."""

# What a run's folder holds its network in.
CHECKPOINT_NAME = "ckpt.pt"
# Bits of a network that is not quantized, and of those that are.
FLOAT_BITS = 32
QUANTIZED_BITS = (2, 3, 4, 5, 6, 7, 8)
# How alpha is searched for after training: least squared error, a percentile, or the better of both.
MSE = "mse"
SEARCHES = (MSE, "percentile", "best")
# Training images that calibration looks at, unless told otherwise.
CALIBRATION_SAMPLES = 512
# How a run trains: train.recipe says what each does.
METHODS = ("plain", "sgt", "smoot", "asg")
OPTIMIZERS = ("sgd", "adam", "adamw", "adadelta")
SCHEDULES = ("cosine", "constant")
# What masked pixels hold; of a step's convolutions, the precision.
FILLS = ("random", "zero", "mean")
STEP_PRECISIONS = ("float32", "bfloat16")
WEIGHT_METHODS = ("absmax", "sawb", "lsq")
ARCHITECTURES = ("cnn2", "resnet20", "resnet18", "mobilenet_v2", "deit_tiny")
# Image folders above this size are decoded batch by batch.
MEMORY_BYTES = 4 << 30
