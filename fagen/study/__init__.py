"""Studies: a story told as steps, each a few changed knobs, every one of them built, verified and timed in one run."""
