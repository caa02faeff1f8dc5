"""Search for the best model of a data set, or run an experiment file of Katib's.

python -m jobs.submit tune --data DIGEST
python -m jobs.submit tune --data DIGEST --preset full --search gp/asha --seed 1
python -m jobs.submit tune --data DIGEST --objectives val_accuracy,latency_ms
python -m jobs.submit tune --experiment FILE
python -m jobs.submit tune --experiment FILE --trainable rayline --data DIGEST
python -m jobs.submit tune --resume SWEEP_RUN_ID
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from lib import cli
from lib.config import PRESETS


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments, run or resume the sweep, print its result."""
    parser = cli.parser("tune", __doc__)
    parser.add_argument("--data", help="digest that jobs.ingest printed")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="quick if left out")
    parser.add_argument(
        "--search",
        metavar="SAMPLER[/SCHEDULER]",
        help="random, grid, sobol, tpe, cmaes or gp / asha, hyperband, medianstopping or none, or "
        "random/pbt; tpe/asha if left out",
    )
    parser.add_argument(
        "--objectives",
        metavar="METRIC[,METRIC]",
        help="val_accuracy, val_loss, num_parameters, latency_ms (of the exported model); "
        "val_accuracy if left out; trials are ranked and stopped early by the first that training "
        "changes",
    )
    parser.add_argument("--seed", type=int, help="of the sampler and of training; 0 if left out")
    parser.add_argument("--experiment", metavar="FILE", help="Katib's, kubeflow.org/v1beta1")
    parser.add_argument(
        "--trainable",
        choices=("command", "rayline"),
        help="what an experiment file runs: its own command, or Rayline's training",
    )
    parser.add_argument(
        "--resume",
        metavar="SWEEP_RUN_ID",
        help="go on with a sweep; with --experiment, under the trial counts of the file",
    )
    arguments = parser.parse_args(argv)
    cli.run(lambda: _tune(arguments), only_json=arguments.json)


def _tune(arguments: argparse.Namespace) -> Mapping[str, Any]:
    from lib.config import Settings
    from lib.ray_session import connect_ray
    from lib.storage import Storage
    from lib.train.asked import Asked, limits_asked_for, search_asked_for
    from lib.train.search import resume_sweep, run_sweep

    settings = Settings.from_env()
    storage = Storage(settings.storage)
    own = ("resume", "json")
    asked = Asked(**{name: value for name, value in vars(arguments).items() if name not in own})
    limits = limits_asked_for(asked) if arguments.resume else None
    search = None if arguments.resume else search_asked_for(asked, storage)
    connect_ray()
    if search is None:
        return resume_sweep(settings, storage, arguments.resume, asked=limits).summary()
    return run_sweep(settings, storage, *search).summary()


if __name__ == "__main__":
    main()
