#!/bin/sh
# The cases as each patch leaves them, rendered into one file for benchmarks/variants.py:
#     sh docs/notes/sm90_next/render.sh variants.json
# PYTHON is what runs fagen. Of each step those rows that it may change.
set -eu
here=$(cd "$(dirname "$0")" && pwd) out=$(realpath "$1") trees=$(mktemp -d)
tree=$trees/steps headers=$trees/steps/templates/include/fagen/sm90
rm -f "$out"
git worktree add -q --detach "$tree" HEAD
trap 'git worktree remove --force "$tree"; rm -rf "$trees"' EXIT

render() {  # under this label, the rows that begin so
  grep -E "^($2)" "$here/cases.txt" >"$trees/cases.txt"
  (cd "$tree" && PYTHONPATH=$tree "${PYTHON:-python3}" benchmarks/variants.py render "$1" "$trees/cases.txt" \
    --target sm_90 --family sm90_forward --out "$out" | tail -1)
}
step() { (cd "$tree" && git apply "$here/$1.patch"); }

render before '.*'
step 1-short-plan && render plan 'doc8'
step 2-two-tiles-first && render two-tiles 'doc8|.*causal|window|small|bert'
step 3-begin-early && render early '.*'
step 4-lean-producers && render lean 'doc8'
step 5-nothing-hidden && render unmasked 'doc8'
step 6-idle-groups && render idle '.*'
# and beyond, where producers spill: is 192 x 128 worth that they be made leaner?
sed -i 's/(kEach <= 128 ? 56 : 72)/(kGroups == 3 ? 32 : kEach <= 128 ? 56 : 72)/' "$headers/layout.cuh"
sed -i 's/(56 if each <= 128 else 72)/(32 if groups == 3 else 56 if each <= 128 else 72)/' \
  "$tree/fagen/families/sm90_forward.py"
render leanest 'doc8-[a-z]*: tile_m=192'
(cd "$tree" && git checkout -q . && for patch in "$here"/*.patch; do git apply "$patch"; done)
sed -i 's/#pragma unroll 1/#pragma unroll 2/' "$headers/producer.cuh"
render unroll2 '.*full s|cross'
