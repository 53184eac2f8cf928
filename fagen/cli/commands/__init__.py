"""One module a verb: `add(subparsers)` registers its parser, `run(args)` returns the exit code."""
