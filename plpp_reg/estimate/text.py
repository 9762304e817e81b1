"""An estimate as lines for a terminal, and as JSON."""

from __future__ import annotations

import json

from plpp_reg.estimate.estimate import Estimate, Part
from plpp_reg.results.numbers import duration

PROCESS_MIB = 700  # resident before a model is there: torch 500, this package and what it imports 200


def as_json(cost: Estimate) -> str:
    return json.dumps({k: v._asdict() if isinstance(v, Part) else v for k, v in cost._asdict().items()}, indent=2)


def as_text(cost: Estimate) -> str:
    """A few lines for a terminal."""
    lines = [
        f"{cost.trainer} on {cost.backbone}, {cost.classes} classes, batch {cost.batch}, {cost.precision}, on {cost.device}",
        f"{'':14}{'seconds':>10}{'share':>8}{'GFLOP':>10}{'MiB':>8}",
    ]
    parts = {"a step": cost.step, "  text tower": cost.text, "  image tower": cost.image, "  PLPP": cost.plpp}
    for name, part in parts.items():
        share = f"{100 * part.seconds / cost.step.seconds:.0f}%" if cost.step.seconds else ""
        lines.append(f"{name:14}{part.seconds:10.3f}{share:>8}{part.operations / 1e9:10.1f}{part.mib:8.0f}")
    measured = ", ".join(f"{name} tower {rate:.0f}" for name, rate in cost.gflop_a_second.items())
    lines += [
        f"a run         {duration(cost.run_seconds)}: {cost.epochs} epochs of {cost.steps} steps",
        f"a test        {duration(cost.test.seconds)}: {cost.test_images:,} images",
        f"peak memory   {cost.peak_mib:,.0f} MiB: {cost.model_mib:,.0f} the model, over it the most of {_over_model(cost)}",
    ]
    if ahead := cost.ahead.seconds:
        lines.append(
            f"in the run    {duration(ahead)} a view, {cost.ahead.mib:,.0f} MiB: features of frozen image towers, once "
            "a (view, image), not at all where they are kept (plpp cache)"
        )
        store = f"the store     {cost.kept_gib:,.2f} GiB of features of the training images' views, bound {cost.max_gib:g} GiB"
        if cost.kept_gib > cost.max_gib > 0:
            store += f": they do not fit, so {cost.views} times of all images (fewer INPUT.VIEWS or a larger FEATURES.MAX_GIB)"
        lines.append(store)
    lines.append(f"measured here {measured} GFLOP/s, on a machine as busy as it was")
    if cost.assumed:
        lines.append(f"assumed       {'; '.join(cost.assumed)}")
    itself = f"the process itself (some {PROCESS_MIB} MiB on a CPU)"
    lines.append(f"not counted   {itself}; reading and augmenting images; freed memory that an allocator keeps")
    return "\n".join(lines)


def _over_model(cost: Estimate) -> str:
    parts = {"a step": cost.step, "frozen image features": cost.ahead, "a test": cost.test}
    return ", ".join(f"{part.mib:,.0f} {name}" for name, part in parts.items() if part.mib)
