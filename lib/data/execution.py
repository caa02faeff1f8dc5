"""How Ray Data runs here: without its own progress bars, ours are lines."""

from __future__ import annotations

import logging

import ray.data


def quiet_ray_data() -> None:
    """Turn off Ray Data's progress bars and notices in this process."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
