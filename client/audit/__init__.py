"""Attacks by the site on its own answers, before a stranger tries them.

Lives here: what the attacks find out (membership, the shares of the classes, what averaging gains), and the page that
says it. Does not live here: anything that leaves. Nothing of an audit is sent, counted in the ledger or released.
"""
