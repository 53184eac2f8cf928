#!/bin/sh
# The cases as each patch leaves them, rendered into one file for benchmarks/variants.py:
#     sh docs/notes/sm90_next/render.sh variants.json
# PYTHON is what runs fagen. Of each step those rows that it may change; of the last but one all.
set -eu
here=$(cd "$(dirname "$0")" && pwd) out=$(realpath "$1") trees=$(mktemp -d)
tree=$trees/steps late=$trees/steps/templates/include/fagen/sm90/producer.cuh
rm -f "$out"
git worktree add -q --detach "$tree" HEAD
trap 'git worktree remove --force "$tree"; rm -rf "$trees"' EXIT

render() {  # under this label, the rows that begin so, with knobs as they are (or all)
  grep -E "^($2)" "$here/cases.txt" | grep -vE "${3:-nothing}" >"$trees/cases.txt"
  (cd "$tree" && PYTHONPATH=$tree "${PYTHON:-python3}" benchmarks/variants.py render "$1" "$trees/cases.txt" \
    --target sm_90 --family sm90_forward --out "$out" | tail -1)
}
step() { (cd "$tree" && git apply "$here/$1.patch"); }

new='=3 q_|pack_heads|cluster|shared_weights|d96|d192'
render before '.*' "$new"
step 1-late && render late '.*' "$new"
for tiles in 1 4; do  # of keys left when the next tile of rows is taken
  sed -i "s/kLate = [0-9]*;/kLate = $tiles;/" "$late"
  render "late$tiles" 'doc8|d128 causal s[28]|d256 causal|small' "$new"
done
sed -i 's/kLate = [0-9]*;/kLate = 2;/' "$late"
step 2-narrow && render narrow '.*causal|window|llama|small' "$new"
step 3-one-loop && render one-loop '.*' "$new"
step 4-knobs
step 5-plan && render plan 'doc8'
step 6-shared-weights && render all '.*'
step 7-ask-early && render ask 'doc8|.*s512|bert|small|d128 causal s2048' "$new"
