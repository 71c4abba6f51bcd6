"""Recipes by name, the published experiments and ours: `python -m train --recipe NAME`, `--list-recipes`.

Every value that a paper prints is the paper's. What it leaves open is said in the row's remark, and is then the
simplest reading: no augmentation, no weight decay, a constant learning rate. What ours reach is recorded in
bench/results/; `python -m bench.rows` trains them in turn.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, replace

from runtime.errors import OptionError
from train.choices import FLOAT_BITS
from train.quantization.spec import QuantSpec
from train.recipe import Recipe


@dataclass(frozen=True)
class NamedRecipe:
    """One row of a paper, or one of ours.

    Args:
        name: what `--recipe` takes.
        source: paper and table; empty for ours.
        figure: the published result; empty for ours.
        arch: one of train.models.build.ARCHITECTURES.
        quant: bits and quantizers.
        recipe: data, method and hyperparameters.
        remark: what the paper leaves open, or what ours starts from.
    """

    name: str
    source: str
    figure: str
    arch: str
    quant: QuantSpec
    recipe: Recipe
    remark: str


_PLAIN_DESCENT = {"schedule": "constant", "momentum": 0.0, "weight_decay": 0.0, "alpha_decay": 0.0}
_MALEKI = Recipe("mnist", "sgt", epochs=50, optimizer="sgd", mask_share=0.5, **_PLAIN_DESCENT)  # type: ignore[arg-type]
_KARKEHABADI = Recipe(
    "mnist", "smoot", epochs=100, batch_size=256, optimizer="adadelta", lr=1.0, mask_share=0.5, kl_weight=1.0,
    top1_weight=0.95, **_PLAIN_DESCENT,  # type: ignore[arg-type]
)  # fmt: skip
_NO_OPTIMIZER = "optimizer not published: gradient descent as in Algorithm 2"
_NO_MU = "mu not published: here 1.5, near the medians of its Tables II and III"
_KARKEHABADI_DEEP = replace(_KARKEHABADI, lr=1e-3, top1_weight=0.8)
_FROM_SCRATCH = f"{_NO_MU}; nor is what it started from: here from random parameters"

PUBLISHED_RUNS = (
    NamedRecipe(
        "maleki2024-mnist", "Maleki et al. 2024, Tables I and II", "99.35 % (99.23 % with --method plain)",
        "resnet20", QuantSpec(8), replace(_MALEKI, lr=0.1, batch_size=128, kl_weight=0.1), _NO_OPTIMIZER,
    ),
    NamedRecipe(
        "maleki2024-cifar10", "Maleki et al. 2024, Tables I and II", "76.12 % (75.55 % with --method plain)",
        "resnet20", QuantSpec(4), replace(_MALEKI, data="cifar10", lr=0.01, batch_size=64, kl_weight=0.05),
        _NO_OPTIMIZER,
    ),
    NamedRecipe(
        "karkehabadi2024-mnist", "Karkehabadi et al. 2024, Tables I and II", "99.40 %, AUC 33.16",
        "cnn2", QuantSpec(FLOAT_BITS), _KARKEHABADI, _NO_MU,
    ),
    NamedRecipe(
        "karkehabadi2024-fashion", "Karkehabadi et al. 2024, Tables I and III", "93.65 %, AUC 36.18",
        "cnn2", QuantSpec(FLOAT_BITS), replace(_KARKEHABADI, data="fashion-mnist"), _NO_MU,
    ),
    NamedRecipe(
        "lavaei2025-kvasir", "Lavaei et al. 2025, Table I", "79.05 %, sensitivity 84.37 %", "resnet20",
        QuantSpec(8),
        Recipe("kvasir", "asg", epochs=50, batch_size=128, optimizer="adam", lr=1e-3, mask_share=0.5,
               image_size=224, flip=True, rotate_degrees=20.0, color_jitter=0.2,
               **_PLAIN_DESCENT),  # type: ignore[arg-type]
        "network, bits, image size, rates and amounts of augmentation not published",
    ),
    NamedRecipe(
        "karkehabadi2024-caltech101", "Karkehabadi et al. 2024, Tables I and IV", "95.10 %", "resnet18",
        QuantSpec(FLOAT_BITS),
        replace(_KARKEHABADI_DEEP, data="caltech101", batch_size=128, image_size=224, pretrained=True),
        f"image size and split not published, {_NO_MU}",
    ),
    NamedRecipe(
        "karkehabadi2024-cifar10", "Karkehabadi et al. 2024, Tables I and V", "96.35 %", "deit_tiny",
        QuantSpec(FLOAT_BITS), replace(_KARKEHABADI_DEEP, data="cifar10"), _FROM_SCRATCH,
    ),
    NamedRecipe(
        "karkehabadi2024-cifar100", "Karkehabadi et al. 2024, Tables I and VI", "79.65 %", "deit_tiny",
        QuantSpec(FLOAT_BITS), replace(_KARKEHABADI_DEEP, data="cifar100"), _FROM_SCRATCH,
    ),
)  # fmt: skip


_MNIST = Recipe(
    "mnist", "plain", epochs=36, precision="bfloat16", crop_padding=2, rotate_degrees=10, zoom=0.1,
    elastic_pixels=0.6, top1_weight=0.95,
)  # fmt: skip
_FASHION = Recipe(
    "fashion-mnist", "plain", epochs=36, precision="bfloat16", crop_padding=1, flip=True, top1_weight=0.95
)
# Small budgets: one core trains a plain epoch in 130 to 320 s, a guided one in 270 to 640 s, by the machine.
_CIFAR10 = Recipe(
    "cifar10", "plain", epochs=43, batch_size=256, lr=0.2, precision="bfloat16", crop_padding=4, flip=True,
    validation=2500,
)  # fmt: skip
# As APoT (Li et al. 2020, section 4): first and last layer at 8 bits, less decay the fewer the bits. The float
# network teaches all of them, and the guided epochs come last, at a low rate.
_CIFAR10_PLAIN = replace(_CIFAR10, weight_decay=1e-4)
_CIFAR10_SGT = replace(_CIFAR10_PLAIN, method="sgt", kl_weight=0.05, lr=0.01)
_FLOAT = "--teacher: clearpact-cifar10-float-longer"


def _own(name: str, arch: str, quant: QuantSpec, recipe: Recipe, remark: str = "") -> NamedRecipe:
    return NamedRecipe(f"clearpact-{name}", "", "", arch, quant, recipe, remark)


OWN_RUNS = (
    _own("mnist-plain", "cnn2", QuantSpec(8), _MNIST),
    _own("mnist", "cnn2", QuantSpec(8), replace(_MNIST, method="sgt", kl_weight=0.1, lr=0.01, epochs=7),
         "--init: clearpact-mnist-plain"),
    _own("fashion-plain", "cnn2", QuantSpec(8), _FASHION),
    _own("fashion-longer", "cnn2", QuantSpec(8), replace(_FASHION, lr=0.04, epochs=30),
         "--init: clearpact-fashion-plain"),
    _own("fashion", "cnn2", QuantSpec(8), replace(_FASHION, method="sgt", kl_weight=0.05, lr=0.01, epochs=10),
         "--init: clearpact-fashion-longer"),
    _own("cifar10-float", "resnet20", QuantSpec(FLOAT_BITS), _CIFAR10),
    _own("cifar10-float-longer", "resnet20", QuantSpec(FLOAT_BITS),
         replace(_CIFAR10, epochs=30, lr=0.12, teacher_weight=0.5),
         "--init: clearpact-cifar10-float, --teacher: the same of another seed"),
    _own("cifar10-8bit-plain", "resnet20", QuantSpec(8), replace(_CIFAR10_PLAIN, epochs=3, lr=0.02),
         f"--init: clearpact-cifar10-float-longer, {_FLOAT}"),
    _own("cifar10-8bit", "resnet20", QuantSpec(8), replace(_CIFAR10_SGT, epochs=3),
         f"--init: clearpact-cifar10-8bit-plain, {_FLOAT}"),
    _own("cifar10-4bit-plain", "resnet20", QuantSpec(4, "lsq"), replace(_CIFAR10_PLAIN, epochs=26, lr=0.04),
         f"--init: clearpact-cifar10-float-longer, {_FLOAT}"),
    _own("cifar10-4bit", "resnet20", QuantSpec(4, "lsq"), replace(_CIFAR10_SGT, epochs=11),
         f"--init: clearpact-cifar10-4bit-plain, {_FLOAT}"),
    _own("cifar10-3bit-plain", "resnet20", QuantSpec(3, "lsq"),
         replace(_CIFAR10_PLAIN, epochs=38, lr=0.03, weight_decay=5e-5),
         f"--init: clearpact-cifar10-4bit-plain, {_FLOAT}"),
    _own("cifar10-3bit", "resnet20", QuantSpec(3, "lsq"), replace(_CIFAR10_SGT, epochs=5, weight_decay=5e-5),
         f"--init: clearpact-cifar10-3bit-plain, {_FLOAT}"),
    _own("cifar10-2bit-plain", "resnet20", QuantSpec(2, "lsq"),
         replace(_CIFAR10_PLAIN, epochs=74, lr=0.03, weight_decay=3e-5),
         f"--init: clearpact-cifar10-3bit-plain, {_FLOAT}"),
    _own("cifar10-2bit", "resnet20", QuantSpec(2, "lsq"), replace(_CIFAR10_SGT, epochs=4, weight_decay=3e-5),
         f"--init: clearpact-cifar10-2bit-plain, {_FLOAT}"),
)  # fmt: skip


def named(name: str) -> NamedRecipe:
    """Return a row by name.

    Raises:
        OptionError: no such row.
    """
    runs = {run.name: run for run in (*PUBLISHED_RUNS, *OWN_RUNS)}
    if name not in runs:
        raise OptionError(f"--recipe {name}: expected one of {', '.join(runs)}; see --list-recipes")
    return runs[name]


def table() -> str:
    """Return all rows as text: each with its published figure, source and remark."""
    lines = [f"{'recipe':27} {'data':14} {'method':7} {'network':9} bits"]
    for run in (*PUBLISHED_RUNS, *OWN_RUNS):
        lines.append(f"{run.name:27} {run.recipe.data:14} {run.recipe.method:7} {run.arch:9} {run.quant.bits:4}")
        published = f"{run.figure}: {run.source}" if run.source else ""
        for text in filter(None, (published, run.remark)):
            lines += textwrap.wrap(text, 79, initial_indent=" " * 4, subsequent_indent=" " * 6)
    return "\n".join(lines)
