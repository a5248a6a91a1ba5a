"""What left a site and at what noise, as records that a ledger can keep.

Lives here: one frozen model a kind of event, its JSON, the events that answers cost, and the steps of a training. Does
not live here: what events add up to (accounting). An event holds parameters and never an epsilon: what events come to
is computed when it is asked, by whatever accounting is best then, over all of them together.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, ValidationError

from consilience.common.errors import StorageError
from consilience.common.settings import Fit, OutputNoise, Pate, Settings, SumNoise

__all__ = ["DpSgdTraining", "Event", "Unit", "event_from", "events_of", "parameters_of", "sampling"]

Unit = Literal["record", "model"]
"""What a guarantee speaks of: whether one record is among the private data, or which model the site has."""

Count = Annotated[int, Field(ge=1, le=2**53)]
Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Event(Settings):
    unit: ClassVar[Unit | None]


class PateVotes(_Event):
    """`count` noisy arg-maxes (GNMax): Gaussian noise `sigma` on every class's count of votes."""

    unit = "record"
    name: Literal["pate-votes"] = "pate-votes"
    sigma: Scale
    count: Count


class PateThreshold(_Event):
    """`count` comparisons of the largest count of votes with a threshold, under Gaussian noise `sigma`."""

    unit = "record"
    name: Literal["pate-threshold"] = "pate-threshold"
    sigma: Scale
    count: Count


class PateAverage(_Event):
    """`count` sums of the parts' probabilities under Gaussian noise `sigma` on every class."""

    unit = "record"
    name: Literal["pate-average"] = "pate-average"
    sigma: Scale
    count: Count


class DpSgdTraining(_Event):
    """One training by noisy gradients, `run`: however often it is told, and whatever was answered since, it is one."""

    unit = "record"
    name: Literal["dp-sgd"] = "dp-sgd"
    noise_multiplier: Scale
    sample_rate: Annotated[float, Field(gt=0, le=1)]
    steps: Count
    run: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Digest of the weights that came out."""
    count: Literal[1] = 1


class NoisyOutputs(_Event):
    """`count` rows of a model's probabilities under Gaussian noise `sigma` on every class."""

    unit = "model"
    name: Literal["output-noise"] = "output-noise"
    sigma: Scale
    count: Count


class SumNoiseOutputs(_Event):
    """`count` rows of a model's probabilities in secure sums that carry Gaussian noise `sigma` on every class.

    If `honest` sites, this one among them, stay, add their shares of it and tell nobody.
    """

    unit = "model"
    name: Literal["sum-noise"] = "sum-noise"
    sigma: Scale
    honest: Annotated[int, Field(ge=1, le=255)]
    count: Count


class BareOutputs(_Event):
    """`count` rows of a model's probabilities as they are."""

    unit = None
    name: Literal["none"] = "none"
    count: Count


Event = PateVotes | PateThreshold | PateAverage | DpSgdTraining | NoisyOutputs | SumNoiseOutputs | BareOutputs
_ADAPTER: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="name")])


def parameters_of(event: Event) -> dict[str, Any]:
    """Return what an event says beside its name and count, as JSON values: what a ledger keeps as its parameters."""
    return event.model_dump(mode="json", exclude={"name", "count"})


def event_from(name: str, parameters: dict[str, Any], count: int) -> Event:
    """Return the event that a ledger kept as its name, parameters and count. Raises `StorageError` for any other."""
    try:
        return _ADAPTER.validate_python({**parameters, "name": name, "count": count})
    except (ValidationError, TypeError) as error:
        told = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise StorageError(
            f"A privacy event {name[:40]!r} is not as it must be: {told}",
            hint="It was changed, or written by a newer version: restore it from a copy, or install that version",
        ) from error


def events_of(settings: Pate | OutputNoise | SumNoise | None, samples: int) -> tuple[Event, ...]:
    """Return what it costs to answer about `samples`, at least 1, by a mechanism that is paid by the answer.

    None stands for no mechanism. Of `confident` both parts are counted for every sample, whether or not it passes.
    """
    if settings is None:
        return (BareOutputs(count=samples),)
    if isinstance(settings, OutputNoise):
        return (NoisyOutputs(sigma=settings.sigma, count=samples),)
    if isinstance(settings, SumNoise):
        return (SumNoiseOutputs(sigma=settings.sigma, honest=settings.honest, count=samples),)
    if settings.answer == "average":
        return (PateAverage(sigma=settings.sigma, count=samples),)
    votes = PateVotes(sigma=settings.sigma, count=samples)
    if settings.threshold_sigma is None:
        return (votes,)
    return (PateThreshold(sigma=settings.threshold_sigma, count=samples), votes)


def sampling(records: int, fit: Fit) -> tuple[float, int]:
    """Return each record's chance to be in a step of a training by noisy gradients, and how many steps an epoch has."""
    rate = min(1.0, fit.batch_size / records)
    return rate, max(1, round(1 / rate))
