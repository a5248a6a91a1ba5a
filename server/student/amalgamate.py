"""Several teachers' features of one layer to one (Shen et al., AAAI 2019; methods.md 1.2).

Lives here: direct and incremental amalgamation, each as one autoencoder of the concatenated features. Does not live
here: the autoencoder itself (autoencoder), moments (moments), and the score layer, which has none: there the target is
the concatenated scores (scores).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from consilience.common.errors import StudentError
from consilience.common.moments import Features, Moments
from consilience.common.seeds import derive
from consilience.server.student.autoencoder import Affine, Autoencoder, check_again, descended, measured, principal


def concatenated(features: Sequence[Features]) -> Features:
    """Return X (n, sum C_i) or (n, sum C_i, H, W): the teachers' features of one layer, channel after channel.

    `features[i]` is (n, C_i) or (n, C_i, H, W). Raises `StudentError` unless they agree in all but C_i.
    """
    shapes = [each.shape for each in features]
    if not shapes or len({(shape[:1], shape[2:]) for shape in shapes}) > 1:
        raise StudentError(
            f"Features of one layer have shapes {', '.join(map(str, shapes)) or 'of no teacher'}; allowed: one or "
            "more that differ in channels alone",
            hint="Set one preprocessing.size for all teachers, or use common-feature learning, which takes any size",
        )
    return np.concatenate(features, axis=1)


def direct(moments: Moments, width: int) -> Autoencoder:
    """Return direct amalgamation (DFA): one autoencoder over all teachers' concatenated features.

    `moments` are of X (see `concatenated`). Of all autoencoders of `width` channels it has the least error. Raises
    `StudentError` for a width outside [1, sum C_i] and when there were no rows.
    """
    return principal(moments, width)


def incremental(moments: Moments, channels: Sequence[int], widths: Sequence[int]) -> Autoencoder:
    """Return incremental amalgamation (IFA): a teacher at a time, each time with what came of those before.

    `moments` are of X; `channels[i]` is C_i. Autoencoder k, of `widths[k]` channels, joins autoencoder k - 1's (at
    first teacher 0's features) with teacher k + 1's, so there is one width fewer than teachers. Each one is fitted to
    its own input alone: with one more teacher, those before stay as they are. What is returned is all of them as one;
    its error is that on X, never below `direct`'s at the last width, for a direction that one step drops is lost to
    those after. Raises `StudentError` when the numbers do not fit together and when there were no rows.
    """
    _check_steps(channels, widths, len(moments.mean))
    encoder = decoder = Affine.identity(channels[0])
    for width, seen in zip(widths, np.cumsum(channels)[1:], strict=True):
        added = Affine.identity(int(seen) - encoder.weight.shape[1])
        encoder, decoder = encoder.beside(added), decoder.beside(added)
        step = principal(_leading(moments, int(seen)).through(encoder.weight, encoder.bias), width)
        encoder, decoder = step.encoder.after(encoder), decoder.after(step.decoder)
    return measured(encoder, decoder, moments)


def incremental_descent(
    blocks: Iterable[Features],
    channels: Sequence[int],
    widths: Sequence[int],
    *,
    epochs: int,
    learning_rate: float,
    seed: int,
    device: torch.device | None = None,
) -> Autoencoder:
    """Return what `incremental` does with every autoencoder found by `autoencoder.descended`, as in the paper.

    `blocks` are of X, read once an epoch and autoencoder. Raises `StudentError` as these two.
    """
    _check_steps(channels, widths, sum(channels))
    check_again(blocks)
    encoder = decoder = Affine.identity(channels[0])
    for number, (width, seen) in enumerate(zip(widths, np.cumsum(channels)[1:].tolist(), strict=True)):
        added = Affine.identity(seen - encoder.weight.shape[1])
        encoder, decoder = encoder.beside(added), decoder.beside(added)
        step = descended(
            _Mapped(blocks, encoder, seen),
            len(encoder.bias),
            width,
            epochs=epochs,
            learning_rate=learning_rate,
            seed=derive(seed, "incremental", number),
            device=device,
        )
        encoder, decoder = step.encoder.after(encoder), decoder.after(step.decoder)
    moments = Moments(sum(channels))
    for block in blocks:
        moments.update(block)
    return measured(encoder, decoder, moments)


class _Mapped:
    """Blocks of features with their first `channels` channels mapped, as often as wanted."""

    def __init__(self, blocks: Iterable[Features], encoder: Affine, channels: int) -> None:
        self._blocks, self._encoder, self._channels = blocks, encoder, channels

    def __iter__(self) -> Iterator[Features]:
        return (self._encoder(block[:, : self._channels]) for block in self._blocks)


def _check_steps(channels: Sequence[int], widths: Sequence[int], given: int) -> None:
    if len(widths) != len(channels) - 1 or sum(channels) != given:
        raise StudentError(
            f"Incremental amalgamation of teachers with {list(channels)} channels to widths {list(widths)} does not "
            f"fit features of {given} channels; allowed: channels that add up, and one width fewer",
            hint="Give one width for each teacher after the first",
        )


def _leading(moments: Moments, channels: int) -> Moments:
    """Return the moments of the first `channels` channels."""
    return moments.through(np.eye(channels, len(moments.mean)), np.zeros(channels))
