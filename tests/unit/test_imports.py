"""The direction of the arrows between modules, and that importing a module does nothing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from lib.line.layout import PRIVATE

ROOT = Path(__file__).resolve().parents[2]
PURE = (
    "lib.config",
    "lib.errors",
    "lib.storage",
    "lib.steps",
    "lib.tables",
    "lib.data.checks",
    "lib.data.manifest",
    "lib.data.direct",
    "lib.train.model",
    "lib.train.augment",
    "lib.train.loop",
    "lib.registry.gaps",
    "lib.train.environment",
    "lib.train.retrain",
    "lib.rebuild",
    "lib.registry.verdict",
    "lib.serving.traffic",
    "lib.serving.predictor",
    "lib.serving.payload",
    "lib.serving.bundle",
    "lib.serving.record",
    "lib.watch.metrics",
    "lib.watch.features",
    "lib.watch.segments",
    "lib.watch.labels",
    "lib.watch.predictions",
    "lib.watch.answers",
    "lib.watch.recorder",
