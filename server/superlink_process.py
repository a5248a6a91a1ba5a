"""Flower's `flower-superlink`, with a bound on what one call of a site may carry: `python -m` this module.

Lives here: that bound. Flower's own is 2 GB, which the SuperLink would hold in memory several times over, for whoever
sends it. Does not live here: starting and watching the process (server/superlink).
"""

from __future__ import annotations

import importlib

MOST_BYTES = 64 * 2**20
"""Bytes of one call: an answer travels in pieces of 5 MB, a card or an agreement in one."""


def main() -> None:
    """Run the command with `sys.argv`."""
    command = importlib.import_module("flwr.superlink.cli.flower_superlink")  # the package shows the function instead
    command.__dict__["GRPC_MAX_MESSAGE_LENGTH"] = MOST_BYTES
    command.flower_superlink()


if __name__ == "__main__":
    main()
