"""Katib's names for what Rayline trains with and reports, as people write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lib.errors import ConfigError
from lib.train.experiment import CATEGORICAL, DOUBLE, Parameter, Value

EPOCHS = "epochs"
_WHOLE = ("stage_width", "depth", "growth", "batch_size", EPOCHS)
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "learning_rate": ("learningrate", "lr"),
    "weight_decay": ("weightdecay", "wd", "l2"),
    "label_smoothing": ("labelsmoothing", "smoothing"),
    "augmentation": ("augmentation", "augmentationstrength"),
    "stage_width": ("stagewidth", "width", "channels"),
    "depth": ("depth", "stagedepth"),
    "growth": ("growth",),
    "batch_size": ("batchsize",),
    "momentum": ("momentum",),
    EPOCHS: ("epochs", "numepochs", "numberepochs", "nepochs"),
}
"""Setting → its other names, without case and marks."""
METRICS: Mapping[str, tuple[str, ...]] = {
    "val_accuracy": ("valaccuracy", "validationaccuracy", "accuracy", "valacc"),
    "val_loss": ("valloss", "validationloss", "loss"),
    "train_loss": ("trainloss", "trainingloss"),
    "num_parameters": ("numparameters",),
    "images_per_s": ("imagespers",),
    "latency_ms": ("latency", "latencyms"),
}


def rayline_parameters(
    parameters: Sequence[Parameter], placeholders: Mapping[str, str]
) -> tuple[Parameter, ...]:
    """Return the parameters under the names of Rayline's settings.

    `placeholders` are the template's names for them: a parameter `x` that the template calls
    `learningRate` is the learning rate. Raises ConfigError naming one that is no setting.
    """
    found: dict[str, Parameter] = {}
    for parameter in parameters:
        names = (parameter.name, placeholders.get(parameter.name, parameter.name))
        setting = next((s for name in names if (s := _lookup(name, SETTINGS))), None)
        if setting is None:
            raise ConfigError(
                f"spec.parameters: {parameter.name!r} is none of Rayline's settings, which are "
                f"{', '.join(SETTINGS)}; rename it, take it out, or use --trainable command"
            )
        if setting in found:
            raise ConfigError(f"spec.parameters: two of them are {setting}")
        found[setting] = _typed(replace(parameter, name=setting), parameter.name)
    return tuple(found.values())


def rayline_settings(
    parameters: Sequence[Parameter],
) -> tuple[tuple[Parameter, ...], dict[str, Value]]:
    """Return the parameters that vary, and the settings that one value leaves no choice of."""
    fixed: dict[str, Value] = {}
    varied = []
    for parameter in parameters:
        if len(parameter.values) == 1:
            fixed[parameter.name] = parameter.values[0]
        elif parameter.low is not None and parameter.low == parameter.high:
            fixed[parameter.name] = parameter.low
        else:
            varied.append(parameter)
    return tuple(varied), fixed


def is_epochs(name: str, placeholders: Mapping[str, str]) -> bool:
    """Whether a parameter is the number of epochs, by its own name or the template's."""
    names = (name, placeholders.get(name, name))
    return any(_lookup(each, SETTINGS) == EPOCHS for each in names)


def most_epochs(parameters: Sequence[Parameter], settings: Mapping[str, Value]) -> int | None:
    """Return the epochs of the longest trial; None if the file does not say."""
    if EPOCHS in settings:
        return int(settings[EPOCHS])
    found = next((parameter for parameter in parameters if parameter.name == EPOCHS), None)
    if found is None:
        return None
    return int(max(map(float, found.values)) if found.values else found.high or 1)


def rayline_metric(name: str) -> str:
    """Return Rayline's name of a metric; raise ConfigError with the known names otherwise."""
    metric = _lookup(name, METRICS)
    if metric is None:
        raise ConfigError(
            f"spec.objective: {name!r} is none of the metrics that Rayline's training reports: "
            f"{', '.join(METRICS)}"
        )
    return metric


def _lookup(name: str, known: Mapping[str, tuple[str, ...]]) -> str | None:
    plain = "".join(letter for letter in name.lower() if letter.isalnum())
    return next((key for key, names in known.items() if plain in names), None)


def _typed(parameter: Parameter, given_name: str) -> Parameter:
    """Return the parameter with numbers as its values; raise ConfigError if it has others."""
    values = parameter.values
    if parameter.kind == CATEGORICAL:
        try:
            values = tuple(_number(str(value)) for value in values)
        except ValueError as error:
            raise ConfigError(f"spec.parameters {given_name}: Rayline's {parameter.name} takes "
                              f"numbers: {error}") from error  # fmt: skip
        parameter = replace(parameter, values=values)
    if parameter.name in _WHOLE and (
        parameter.kind == DOUBLE or not all(isinstance(value, int) for value in values)
    ):
        raise ConfigError(
            f"spec.parameters {given_name}: Rayline's {parameter.name} takes whole numbers; make "
            "it an int parameter, or list whole numbers"
        )
    return parameter


def _number(text: str) -> float | int:
    return int(text) if text.strip().isdigit() else float(text)
