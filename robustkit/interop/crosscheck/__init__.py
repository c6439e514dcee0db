"""The same attacks through other libraries, image by image."""

from robustkit.interop.crosscheck.autoattack import autoattack_version, duel, duel_lines, unserved
from robustkit.interop.crosscheck.libraries import crosscheck, peers, table

__all__ = ["autoattack_version", "crosscheck", "duel", "duel_lines", "peers", "table", "unserved"]
