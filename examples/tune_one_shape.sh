#!/bin/sh
# Tune one shape, and see that calls of that shape use the winner. On a GPU drop "--target cpu --dtype fp32", and give
# it minutes: --budget 3m in the place of --trials.
set -e
shape="--target cpu --dtype fp32 --head-dim 64 --mask causal --seqlen 256 --heads 4"

fagen tune $shape --trials "${TRIALS:-8}"

# picked: exact. The record is in your own database, which every process of yours reads.
fagen explain $shape
fagen db show d64/causal

# The winner as files; its manifest has the command that makes the same kernel again.
fagen emit $shape --out "${OUT:-winner}"
