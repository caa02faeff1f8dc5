"""The shapes of HTTP bodies, for the OpenAPI document and its readers."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, RootModel


class Prediction(BaseModel):
    """An answer to POST /predict."""

    label: str = Field(description="The most probable class.")
    digit: int = Field(description="Its number in the order of the classes.")
    probabilities: list[float] = Field(description="One per class, in the order of the classes.")
    model: str
    model_version: int
    request_id: str


class ImageBody(BaseModel):
    """One image as JSON."""

    image: list[Any] = Field(description="Integers 0–255, nested as [height][width][channels].")


class Feedback(BaseModel):
    """The true label of an answered request."""

    request_id: str = Field(pattern="^[A-Za-z0-9._-]{1,128}$")
    label: str | int = Field(description="A class name, or its number.")
    index: int = Field(default=0, ge=0, description="Which image of a batch, from 0.")
    model: str | None = Field(default=None, description="The default model if left out.")


class FeedbackStored(BaseModel):
    """The label is on disk."""

    request_id: str
    stored: bool
    known: bool | None = Field(
        description="Whether exactly one answer has this id, so that the label is joined with it; "
        "null if that was not found out."
    )
    why: str | None = Field(default=None, description="Where `known` is not true.")


class Tensor(BaseModel):
    """An input of the Open Inference Protocol."""

    name: str = Field(description="`images`.")
    datatype: str = Field(description="`UINT8`.")
    shape: list[int] = Field(description="[N, height, width, channels].")
    data: list[Any] | None = Field(
        default=None, description="Nested or flat; left out where the tensor is binary."
    )
    parameters: dict[str, Any] | None = Field(
        default=None, description="`binary_data_size`: bytes of the tensor after the JSON."
    )


class Output(BaseModel):
    """How an output is wanted."""

    name: str = Field(description="`probabilities`.")
    parameters: dict[str, Any] | None = Field(default=None, description="`binary_data`.")


class InferBody(BaseModel):
    """A request of the Open Inference Protocol."""

    id: str | None = Field(default=None, pattern="^[A-Za-z0-9._-]{0,128}$")
    inputs: list[Tensor] = Field(min_length=1, max_length=1)
    outputs: list[Output] | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="`binary_data_output`.")


class IndexRequest(BaseModel):
    """Which versions to list."""

    ready: bool = Field(default=False, description="Only those that are up.")


class ModelIndex(BaseModel):
    """A version and its state."""

    name: str
    version: str
    state: str = Field(description="READY or UNAVAILABLE.")
    reason: str


class RepositoryIndex(RootModel[list[ModelIndex]]):
    """Every version with its state."""


class Error(BaseModel):
    """What is wrong and what to do about it."""

    error: str
    request_id: str
