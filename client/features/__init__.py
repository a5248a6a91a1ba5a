"""Features of a teacher's layers, as a site may let them out.

Lives here: what the rest of the client needs of the modules below. Does not live here: the policy's fields
(common/settings.Features), how questions about features are answered (client/encoder), their bytes
(common/encoding/features).
"""

from __future__ import annotations

from consilience.client.features.showing import learn_and_show_bases, taps, tell_shape, tell_taps
from consilience.client.features.taps import OpenTap, learn_bases, open_taps
from consilience.client.features.together import Together

__all__ = ["OpenTap", "Together", "learn_and_show_bases", "learn_bases", "open_taps", "taps", "tell_shape", "tell_taps"]
