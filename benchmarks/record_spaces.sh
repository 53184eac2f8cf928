#!/usr/bin/env bash
# Records spaces of sm90_forward on an H200: every legal config of a restriction, measured in full, for
# `fagen tune --simulate`. A call that is cut off is repeated: what was measured is kept in the run's folder
# (XDG_STATE_HOME) and `--resume` goes on. usage: record_spaces.sh FOLDER [MINUTES] [NAME...]
set -u
out=${1:?folder for the files}; budget=${2:-9m}; shift $(( $# > 2 ? 2 : $# ))
names=${*:-d128_full d128_causal_gqa d64_causal d256_causal d128_window d128_full_short d128_causal_short}
mkdir -p "$out"
until=$(( $(date +%s) + ${budget%m} * 60 ))
# GPUS=all: on all GPUs of the machine at once
where="--target gpu"; [ -z "${GPUS:-}" ] || where="--gpus $GPUS"
common="$where --family sm90_forward --dtype bf16 --fix overlap=true --fix rescale=deferred --fix section_mb=32"
causal="--fix block_order=longest_first,sectioned"
for name in $names; do
  left=$(( until - $(date +%s) ))
  [ "$left" -gt 20 ] || break
  case $name in
    d64_causal) flags="--head-dim 64 --mask causal --batch 16 --heads 16 --seqlen 1k
                       --fix tile_n=64,96,128,160 --fix stages=2,3 $causal" ;;
    d128_full) flags="--head-dim 128 --mask none --batch 4 --heads 16 --seqlen 4k
                      --fix tile_n=32,64,80,96,112,128,144,160,176 --fix stages=1,2,3 --fix block_order=ascending" ;;
    d128_full_short) flags="--head-dim 128 --mask none --batch 32 --heads 16 --seqlen 512
                      --fix tile_n=32,64,80,96,112,128,144,160,176 --fix stages=1,2,3 --fix block_order=ascending" ;;
    d128_causal_gqa) flags="--head-dim 128 --mask causal --batch 1 --heads 32 --kv-heads 8 --seqlen 8k
                      --fix tile_n=64,80,96,128,160,176 --fix stages=1,2 $causal" ;;
    d128_causal_short) flags="--head-dim 128 --mask causal --batch 1 --heads 32 --kv-heads 8 --seqlen 1k
                      --fix tile_n=64,80,96,128,160,176 --fix stages=1,2 $causal" ;;
    d256_causal) flags="--head-dim 256 --mask causal --batch 4 --heads 16 --kv-heads 8 --seqlen 2k $causal" ;;
    d128_window) flags="--head-dim 128 --mask window --window 1023,0 --batch 4 --heads 32 --kv-heads 8 --seqlen-q 128
                      --seqlen-k 4k --fix tile_n=64,96,128,176 --fix stages=1,2
                      --fix block_order=ascending,longest_first,sectioned" ;;
    *) echo "unknown space $name" >&2; exit 2 ;;
  esac
  # shellcheck disable=SC2086
  "${PYTHON:-python}" -m fagen tune $common $flags --record "$out/h200_$name.jsonl.xz" --resume --budget "${left}s" --out "$out/db" \
    || echo "$name: exit $?" >&2
done
