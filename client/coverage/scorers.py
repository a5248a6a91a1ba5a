"""Scores that tell a site's classes from the rest of a pool: higher means more like the private data.

Lives here: how each is learned from private and pool images, and how it is kept. Does not live here: which images
(learning), and what makes a probability of a score (prior, calibrate).
"""

from __future__ import annotations
