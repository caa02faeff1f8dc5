"""The model card: what a version is, how good, and how to use it, as Markdown for people."""

from __future__ import annotations

from lib.config import Settings
from lib.data.manifest import Manifest
from lib.registry.evaluate import Evaluation
from lib.registry.models import Facts

MAX_CHARS = 5000
"""MLflow's column for a description holds no more."""
_SHOWN = 10
_NAME_CHARS = 40


def model_card(
    settings: Settings, facts: Facts, on_test: Evaluation, manifest: Manifest, uri: str
) -> str:
    """Return the card of a version; `uri` is what MLflow loads it from."""
    height, width, channels = manifest.shape
    rows = ", ".join(f"{manifest.rows(split):,} {split}" for split in manifest.counts)
    metrics = {
        "test accuracy": facts.test_accuracy,
        "test accuracy, mean of classes": facts.test_macro_accuracy,
        "test macro F1": facts.test_macro_f1,
        "validation accuracy": facts.val_accuracy,
        "logistic regression, validation accuracy": facts.baseline_val_accuracy,
    }
    worst = sorted(on_test.per_class_accuracy.items(), key=lambda item: (item[1], item[0]))[:3]
    base = settings.serve_url or f"http://127.0.0.1:{settings.http_port}"
    origin = (
        f"registered from `{facts.origin_uri}`"
        if facts.origin_uri
        else f"trial of sweep `{facts.sweep_run_id}`, commit `{facts.git_commit or 'unknown'}`"
    )
    unmeasured = len(manifest.class_names) - len(on_test.per_class_accuracy)
    lines = [
        *_purpose(settings, manifest),
        "## Data",
        f"`{_short(manifest.source)}`, digest `{manifest.digest}`: {rows} images.",
        "## Metrics",
        "| metric | value |\n| --- | --- |\n"
        + "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items()),
        "Worst classes on test: "
        + ", ".join(f"{_short(name)} {value:.4f}" for name, value in worst)
        + ". All classes and the confusion matrix are in `evaluation.json`, beside the model.",
        "## Limits",
        f"- It knows these classes alone: an image of anything else gets one of them too.\n"
        f"- Measured on {on_test.rows:,} test images from the same source as the training images; "
        "nothing is known of others.\n"
        f"- Images of another size than {height}×{width}×{channels} are scaled."
        + (f"\n- {unmeasured} classes have no test images." if unmeasured else ""),
        "## Use",
        f"```sh\ncurl -H 'Content-Type: image/png' --data-binary @image.png "
        f"{base}/predict/{settings.model}\n```",
        f'```python\nimport mlflow\nmodel = mlflow.pyfunc.load_model("{uri}")  '
        f"# or mlflow.onnx.load_model\n"
        f"model.predict(images)  # uint8 (N, {height}, {width}, {channels}) → probabilities\n```",
        "## Origin",
        f"Run `{facts.trial_run_id}`, {origin}, by {facts.owner or 'unknown'}. "
        "`python -m jobs.report VERSION` writes a report of the version.",
    ]
    return "\n\n".join(lines)[:MAX_CHARS]


def registered_model_card(settings: Settings, manifest: Manifest) -> str:
    """Return what all versions of a model have in common."""
    lines = [
        *_purpose(settings, manifest),
        "`champion` is the version that serves, `challenger` the next candidate. "
        "`python -m jobs.models list` ranks the versions, `best --rank N --fetch DIR` gives one.",
    ]
    return "\n\n".join(lines)[:MAX_CHARS]


def _purpose(settings: Settings, manifest: Manifest) -> list[str]:
    height, width, channels = manifest.shape
    names = [_short(name) for name in manifest.class_names]
    shown = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
    return [
        f"# {settings.model}",
        f"Classifies images ({height}×{width}, {channels} channel{'s' * (channels > 1)}) into "
        f"{len(names)} classes: {shown}.",
    ]


def _short(name: str) -> str:
    """Return a name for Markdown: on one line, and not without end."""
    name = " ".join(name.replace("|", "/").replace("`", "'").split())
    return name if len(name) <= _NAME_CHARS else f"{name[: _NAME_CHARS - 1]}…"
