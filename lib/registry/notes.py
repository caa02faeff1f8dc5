"""What happened to a version after its registration, as tags of it in MLflow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lib.config import Settings
from lib.registry.models import CHALLENGER
from lib.registry.server import connect, explained

ROLLOUT_TAG = "rayline.rollout"
"""How the newest rollout of a version ended: `promoted`, `rolled_back`, `held`, `aborted`."""
REASON_TAG = "rayline.rollout_reason"
EVIDENCE_TAG = "rayline.rollout_evidence"
"""JSON: the stage, the gates' findings, and what happened when."""
MAX_EVIDENCE_CHARS = 50_000
"""MLflow takes 100,000 in a tag."""


def note_rollout(
    settings: Settings,
    name: str,
    version: int,
    *,
    status: str,
    reason: str,
    evidence: Mapping[str, Any],
    is_refused: bool,
) -> None:
    """Write how a rollout ended onto its version.

    A version that was refused is no challenger any more, else the next deploy would serve it.
    Raises RegistryError if MLflow does not take it.
    """
    client = connect(settings)
    text = json.dumps(evidence)
    if len(text) > MAX_EVIDENCE_CHARS:
        text = json.dumps({**evidence, "history": "left out: too long"})
    tags = {ROLLOUT_TAG: status, REASON_TAG: reason[:5000], EVIDENCE_TAG: text}
    with explained(settings, f"noting the rollout of version {version}"):
        for key, value in tags.items():
            client.set_model_version_tag(name, str(version), key, value)
        aliases = client.get_registered_model(name).aliases
        if is_refused and str(aliases.get(CHALLENGER)) == str(version):
            client.delete_registered_model_alias(name, CHALLENGER)
