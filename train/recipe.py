"""What a training run is: data, method and every hyperparameter."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from runtime.errors import OptionError
from train.choices import FILLS, METHODS, OPTIMIZERS, SCHEDULES, STEP_PRECISIONS
from train.data.augment import Augmentation
from train.data.names import DATA_SETS, EXPECTED, MEDMNIST, PREFIX, data_name, is_folder


@dataclass(frozen=True)
class Recipe:
    """Everything that, with the code's version, decides the result of a run.

    Args:
        data: one of train.data.names.DATA_SETS, or "folder:PATH".
        image_size: side in pixels to which an image folder's images are cropped and resized; 0 for other data.
        split_seed: of the split of an image folder that has none of its own.
        test_share: of the images that such a split tests on, 0 to 0.5.
        split: digest of an image folder's split, see train.data.splits; "" before the run has begun.
        validation: training images held out to choose among runs, where the data set has no such split; the same
            ones whatever the seed, so that what starts from a run or learns from it has not seen them either.
        method: one of METHODS.
        epochs: passes over the training images.
        batch_size: images a step.
        optimizer: one of OPTIMIZERS.
        lr: (peak) learning rate.
        schedule: "cosine" (one epoch of linear warm-up, then a cosine to zero) or "constant".
        momentum: Nesterov momentum of SGD.
        weight_decay: L2 on weights (not on biases and BatchNorm).
        alpha_decay: L2 on PACT's alpha.
        alpha_lr: learning rate of alpha as a multiple of lr. Its gradient sums over every clipped activation of a
            batch, and can throw alpha below zero where lr suits the weights.
        label_smoothing: of the cross entropy.
        flip, crop_padding, rotate_degrees, zoom, elastic_pixels, erase_pixels, color_jitter: see data/augment.py.
        class_weights: weight the loss by the rarity of each image's class.
        balanced_sampling: draw every class equally often, with replacement.
        mask_share: share of the pixels that saliency-guided training masks, 0 to 1; where smoot and asg start.
        kl_weight: lambda (lambda_1 of asg), weight of the divergence between clean and masked outputs.
        fill: what masked pixels hold, one of train.choices.FILLS; asg always masks with zeros.
        top1_weight: alpha of smoot, weight of the most probable class in what adapts the mask share.
        mask_speed: mu of smoot, percentage points of the mask share for a change of 1 in probability.
        saliency_weight: lambda_2 of asg, weight of ||S||_1.
        alpha_weight: eta of asg, weight of |alpha|.
        threshold_rate: gamma of asg, learning rate of the threshold in units of its start.
        precision: of the steps' convolutions, one of train.choices.STEP_PRECISIONS; accuracy is
            measured in float32.
        init: checkpoint of the same architecture, of any bits, whose parameters the run starts from, and
            where it was quantized in the same way, whose alphas and scales; "": random.
        pretrained: start from the parameters that torchvision trained on ImageNet.
        teacher: checkpoint whose probabilities the network also learns; "": none.
        teacher_weight: share of the cross entropy that the teacher's probabilities replace, 0 to 1.
        temperature: of the teacher's and the network's probabilities.
        seed: of initialization, data order, augmentation, dropout and fill.
    """

    data: str
    method: str = "sgt"
    epochs: int = 10
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.05
    schedule: str = "cosine"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    alpha_decay: float = 5e-4
    alpha_lr: float = 1.0
    label_smoothing: float = 0.0
    flip: bool = False
    crop_padding: int = 0
    rotate_degrees: float = 0.0
    zoom: float = 0.0
    elastic_pixels: float = 0.0
    erase_pixels: int = 0
    color_jitter: float = 0.0
    class_weights: bool = False
    balanced_sampling: bool = False
    mask_share: float = 0.5
    kl_weight: float = 1.0
    fill: str = "random"
    top1_weight: float = 0.8
    mask_speed: float = 1.5
    saliency_weight: float = 1e-3
    alpha_weight: float = 1e-4
    threshold_rate: float = 0.01
    precision: str = "float32"
    init: str = ""
    pretrained: bool = False
    teacher: str = ""
    teacher_weight: float = 0.7
    temperature: float = 4.0
    seed: int = 0
    image_size: int = 0
    split_seed: int = 0
    test_share: float = 0.1
    split: str = ""
    validation: int = 0

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            OptionError: a field is outside its range.
        """
        choices_of = {
            "method": METHODS, "optimizer": OPTIMIZERS, "schedule": SCHEDULES, "fill": FILLS,
            "precision": STEP_PRECISIONS,
        }  # fmt: skip
        if self.data not in DATA_SETS and not is_folder(self.data):
            raise OptionError(f"data {self.data!r}: expected one of {EXPECTED}")
        if is_folder(self.data) != (self.image_size > 0):
            expected = "a side in pixels, as in 64" if is_folder(self.data) else "none, its images have one size"
            raise OptionError(f"image_size {self.image_size} of {self.data}: expected {expected}")
        if self.validation and (is_folder(self.data) or self.data in MEDMNIST):
            raise OptionError(
                f"validation {self.validation} of {self.data}: expected none, it has a split of its own"
            )
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise OptionError(f"{name} {getattr(self, name)!r}: expected one of {', '.join(choices)}")
        for name in (f.name for f in fields(self) if f.type in ("int", "float")):
            value, smallest = getattr(self, name), {"epochs": 1, "batch_size": 2, "temperature": 1e-3}.get(name, 0)
            if not (math.isfinite(value) and value >= smallest):
                raise OptionError(f"{name} {value}: expected a number >= {smallest}")
        for name in ("mask_share", "label_smoothing", "momentum", "top1_weight", "teacher_weight"):
            if getattr(self, name) > 1:
                raise OptionError(f"{name} {getattr(self, name)}: expected a share from 0 to 1")
        if self.balanced_sampling and (self.class_weights or self.method == "smoot"):
            other = (
                "class_weights" if self.class_weights else "method smoot, which adapts each image once an epoch"
            )
            raise OptionError(f"balanced_sampling together with {other}: expected one of them; drop the other")
        if self.test_share > 0.5:
            raise OptionError(f"test_share {self.test_share}: expected a share from 0 to 0.5")
        if self.color_jitter > 1:
            raise OptionError(f"color_jitter {self.color_jitter}: expected a share from 0 to 1")
        if self.init and self.pretrained:
            raise OptionError(f"init {self.init} and pretrained: both say where to start from; choose one")
        if self.method == "smoot" and not 0.2 <= self.mask_share <= 0.8:
            raise OptionError(f"mask_share {self.mask_share}: expected 0.2 to 0.8, the bounds of smoot's masks")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Return the recipe a checkpoint holds.

        Raises:
            OptionError: a field is unknown or out of range.
        """
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise OptionError(f"recipe: unknown fields {sorted(unknown)}; made by a newer version")
        return cls(**values)

    @property
    def data_name(self) -> str:
        """Name of the data set and its split, without the path of its folder."""
        return data_name(self.data, self.split)

    @property
    def augmentation(self) -> Augmentation:
        """What is done to the training images."""
        names = [field.name for field in fields(Augmentation)]
        return Augmentation(**{name: getattr(self, name) for name in names})

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate of a step, counted over the whole run from 0."""
        if self.schedule == "constant":
            return self.lr
        warm_up = min(steps_per_epoch, self.epochs * steps_per_epoch // 4)
        if step < warm_up:
            return self.lr * (step + 1) / warm_up
        done = (step - warm_up) / max(1, self.epochs * steps_per_epoch - warm_up)
        return self.lr * (1 + math.cos(math.pi * done)) / 2


_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 30, "batch_size": 64},
    "mnist": {"epochs": 10, "top1_weight": 0.95},
    "fashion-mnist": {"epochs": 20, "top1_weight": 0.95},
    "cifar10": {"epochs": 100, "lr": 0.1, "crop_padding": 4, "flip": True},
    "cifar100": {"epochs": 100, "lr": 0.1, "crop_padding": 4, "flip": True},
    PREFIX: {"epochs": 30, "batch_size": 64, "image_size": 64},
    "kvasir": {
        "epochs": 50, "image_size": 224, "flip": True, "rotate_degrees": 20.0, "color_jitter": 0.2
    },
    "caltech101": {"epochs": 50, "image_size": 224, "flip": True},
}  # fmt: skip
# Algorithm 2 of Lavaei et al. 2025: Adam, and alpha regularized by its magnitude instead of its square.
_METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "asg": {"optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0, "alpha_decay": 0.0},
}


def default_recipe(data: str, method: str = "sgt") -> Recipe:
    """Return the recipe that `python -m train` starts from for a data set.

    Raises:
        OptionError: no such data set or method.
    """
    defaults = _DEFAULTS.get(PREFIX if data.startswith(PREFIX) else data, {})
    return Recipe(**{"data": data, "method": method, **defaults, **_METHOD_DEFAULTS.get(method, {})})
