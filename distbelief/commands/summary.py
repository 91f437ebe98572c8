"""Summary: a result, or a length of time, in words for a person."""

from collections.abc import Mapping
from typing import Any

from distbelief.problem import MORE


def summary(result: Mapping[str, Any]) -> str:  # Any: JSON
    """A result as it stands in result.json."""
    stale = result["staleness"]
    lines = [
        f"{result['exit']}: run {result['run']}",
        f"  {result['samples']} samples in {result['updates']} updates, "
        f"{result['train_s']:.1f} s of training ({result['samples_per_s']:.0f} samples/s), "
        f"{result['wall_s']:.1f} s in all",
    ]
    if result["samples"]:
        shares = ", ".join(f"{w} {n}" for w, n in result["worker_samples"].items())
        lines.append(f"  samples by worker: {shares}")
    if stale["max"] is not None:
        lines.append(f"  staleness p50/p95/max {stale['p50']}/{stale['p95']}/{stale['max']}")
    if result["train_loss"] is not None:
        lines.append(f"  train loss {result['train_loss']:.4g}")
    if result.get("drained"):
        lines.append(f"  workers drained: {', '.join(result['drained'])}")
    for field, text in (
        ("workers_lost", "workers lost on the way"),
        ("refused", "parts of pushes that shards refused"),
        ("bad_samples", "samples that could not be read"),
        ("skipped_samples", "samples whose gradient was thrown away before a step took it"),
        ("unfinished", "samples handed out and not applied"),
    ):
        if result.get(field):
            lines.append(f"  {text}: {result[field]}")
    if result.get("accounting", {}).get("handed_out"):
        lines.append("  " + accounting(result["accounting"]))
    if result["eval"] is not None:
        lines.append("  " + accuracy(result["eval"]))
    if result.get("eval_last") is not None:
        lines.append(f"  the last values, not averaged: {accuracy(result['eval_last'])}")
    lines.append(f"  {result['run_dir']}/result.json")
    if result.get("resume"):
        samples = f" from {result['saved']['samples']:,.0f} samples" if result.get("saved") else ""
        lines.append(f"go on{samples} with\n  {result['resume']}")
    return "\n".join(lines)


def accounting(found: Mapping[str, int | bool]) -> str:
    """What became of the samples that were handed out."""
    words = (
        "applied",
        "partial",
        "refused",
        "skipped",
        "left_out",
        "lost",
        "returned",
        "in_flight",
    )
    fates = [f"{found[word]:,} {word.replace('_', ' ')}" for word in words if found[word]]
    beyond = f" - {found['beyond']:,} never handed out" if found["beyond"] else ""
    verdict = (
        "the shards count the same" if found["adds_up"] else "this was not confirmed by shards"
    )
    return f"samples handed out {found['handed_out']:,} = {' + '.join(fates)}{beyond}; {verdict}"


def accuracy(found: Mapping[str, Any]) -> str:  # Any: JSON
    """How good a model is, as far as it is known."""
    known = (("top-1", "top1", ".4f"), ("top-5", "top5", ".4f"), ("loss", "loss", ".4g"))
    return f"{found['split']} " + ", ".join(
        f"{name} {found[key]:{form}}" for name, key, form in known if found.get(key) is not None
    )


def error_text(error: Mapping[str, str]) -> str:
    """The error of a result, with the place where its code is explained."""
    return f"{error['text']}\n  more  {MORE}#{error['code'].lower()}"


def duration(seconds: float) -> str:
    """A length of time in its largest unit or two."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = int(seconds) // 60
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d"


STATE_COLORS = {"done": "green", "failed": "red", "storage": "red", "killed": "red"}
"""Of the words in state.py; the others are plain."""
