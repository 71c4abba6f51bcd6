"""`python -m train`: train one network into a run folder."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module: python -m train")

from collections.abc import Sequence

from runtime import command
from train.options import training_parser


def main(argv: Sequence[str] | None = None) -> None:
    """Train or resume one run: checkpoint, metrics.csv, TensorBoard events and plots in its folder."""
    parser = training_parser()
    options = parser.parse_args(argv)
    from train import recipes, run  # torch takes seconds to import: --help does without

    if options.list_recipes:
        print(recipes.table())
    else:
        run.train(options, parser)


if __name__ == "__main__":
    command.run(main)
