"""Secure sums: what sites and server must agree on so that the server learns only sums over sites.

Lives here: fixed-point numbers (`ring`), keys and masks (`masks`), shares of seeds (`shares`), the messages
(`messages`), and what sums tell all the same (`revealed`). Does not live here: a site's part (client/sums) and the
server's (server/secure_sums). The protocol and its adversary are in docs/secure_sums.md.
"""
