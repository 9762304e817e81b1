"""``plpp cache``: the kept image features."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clear", action="store_true", help="remove them")


def main(args: argparse.Namespace) -> None:
    from plpp_reg.engine.features import clear_cache, feature_store

    store = feature_store(1)
    entries, halves = store.entries(), store.halves()
    print(f"{store.folder}: {len(entries)} file{'s' * (len(entries) != 1)}, {_mib(entry.size for entry in entries)}")
    if halves:
        print(f"half-written, by runs at work or killed ones: {len(halves)}, {_mib(entry.size for entry in halves)}")
    if entries:
        days = [f"{(time.time() - entry.used) / 86400:.1f}" for entry in (entries[0], entries[-1])]
        print(f"last used {days[0]} (the oldest) to {days[1]} days ago; FEATURES.MAX_GIB bounds them, --clear removes them")
    if args.clear:
        print(f"removed {clear_cache()}")


def _mib(sizes: Iterable[int]) -> str:
    return f"{sum(sizes) / 2**20:.1f} MiB"
