"""Ablations: each design change as a step of a few knobs, all built, verified and timed in one run."""
