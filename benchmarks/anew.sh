#!/usr/bin/env bash
# A change of templates, and new families, on a Hopper card, in pieces of some minutes each:
#   anew.sh check OUT     tests/gpu, and generated/ verified; check_forward: the older families
#   anew.sh tune OUT      tuning_db/ tuned for problems/hopper.toml; BUDGET (515s), GPUS=all for all of the machine
#   anew.sh tune_backward OUT   the same for problems/hopper_backward.toml
#   anew.sh few_rows OUT  keys that blocks share: tests, winners, ${CARD}_few_rows.json; FA3 as below
#   anew.sh hopper_decode OUT   sm90_decode, sm90_decode_mla: tests, ${CARD}_mla.json, ${CARD}_mixed.json, their knobs
#   anew.sh figures OUT   ${CARD}_peers.json and ${CARD}_masks.json; FA3: the path of FlashAttention 3's library
# The checkout is changed; OUT gets copies and logs. Each piece ends after SECONDS_AT_MOST (570), with what it has.
set -u
piece=${1:?check, check_forward, tune, tune_backward, few_rows, hopper_decode or figures} out=${2:?folder for copies and logs} python=${PYTHON:-python3}
end=$(( $(date +%s) + ${SECONDS_AT_MOST:-570} ))
mkdir -p "$out"

part() {  # NAME COMMAND...: as long as there is time; its last lines are shown
  local name=$1 left=$(( end - $(date +%s) )); shift
  timeout -s INT $(( left > 5 ? left : 5 )) "$@" > "$out/$name.log" 2>&1
  echo "== $name: exit $?, $(( end - $(date +%s) )) s left"
  tail -n 12 "$out/$name.log" | cut -c 1-300
}

case $piece in
  check)  # what has changed most since it last ran comes first
    tests() { part "$1" "$python" -m pytest -q "${@:2}"; }
    tests sm90_backward tests/gpu/test_sm90_backward.py
    tests decode tests/gpu/test_sm80_decode.py tests/gpu/test_kvcache_cuda.py
    tests softmax tests/gpu/test_simt_softmax.py
    tests simt tests/gpu/test_simt_forward.py tests/gpu/test_simt_backward.py
    tests gradients tests/gpu/test_gradients_cuda.py
    part generated "$python" -m fagen.cli.generated verify
    cp generated/manifest.json "$out/"
    tests op tests/gpu/test_op_cuda.py tests/gpu/test_measure_cuda.py tests/gpu/test_trust_cuda.py \
      tests/gpu/test_ablation_cuda.py tests/gpu/test_torch_impl_cuda.py
    tests sanitizer tests/gpu/test_sanitizer.py ;;
  check_forward)
    tests() { part "$1" "$python" -m pytest -q "${@:2}"; }
    tests sm90 tests/gpu/test_sm90_forward.py
    tests sm80 tests/gpu/test_sm80_forward.py
    tests sm80_backward tests/gpu/test_sm80_backward.py ;;
  tune)
    # shellcheck disable=SC2086
    part tune "$python" -m fagen tune --problems benchmarks/problems/hopper.toml --family sm90_forward \
      --budget "${BUDGET:-515s}" ${GPUS:+--gpus $GPUS} --out tuning_db
    tar -C tuning_db -cJf "$out/sm_90.tar.xz" sm_90 ;;
  tune_backward)
    # shellcheck disable=SC2086
    part tune "$python" -m fagen tune --problems benchmarks/problems/hopper_backward.toml --family sm90_backward \
      --budget "${BUDGET:-515s}" ${GPUS:+--gpus $GPUS} --out tuning_db
    tar -C tuning_db -cJf "$out/sm_90.tar.xz" sm_90 ;;
  few_rows)
    part split "$python" -m pytest -q tests/gpu/test_sm90_forward.py tests/gpu/test_sm80_forward.py -k "split or parts"
    # shellcheck disable=SC2086
    part tune "$python" -m fagen tune --problems benchmarks/problems/few_rows.toml --family sm90_forward \
      --budget "${BUDGET:-240s}" ${GPUS:+--gpus $GPUS} --out tuning_db
    tar -C tuning_db -cJf "$out/sm_90.tar.xz" sm_90
    part rows "$python" -m fagen bench --suite few_rows --peers cudnn,fa3 --fa3 "${FA3:?the path of its library}" \
      --rounds 9 --out benchmarks/${CARD}_few_rows.json --markdown "$out/few_rows.md"
    cp benchmarks/${CARD}_few_rows.json "$out/" ;;
  hopper_decode)
    part tests "$python" -m pytest -q tests/gpu/test_sm90_decode_mla.py tests/gpu/test_sm90_decode.py
    rows() { part "$1" "$python" -m fagen bench --op decode --suite "$1" --family "$2" --peers "$3" ${FA3:+--fa3 $FA3} \
      --rounds 9 --min-time 0.3 --out "benchmarks/${CARD}_$1.json" --markdown "$out/$1.md"; cp "benchmarks/${CARD}_$1.json" "$out/"; }
    rows mla sm90_decode_mla flash_mla,flashinfer
    rows mixed sm90_decode "${FA3:+fa3,}flashinfer"
    for family in mla:sm90_decode_mla sm90_decode:sm90_decode; do
      "$python" benchmarks/variants.py render now "benchmarks/problems/${family%:*}_variants.txt" --target sm_90 \
        --family "${family#*:}" --out "$out/variants.json"
    done
    part knobs "$python" benchmarks/variants.py time "$out/variants.json" --min-time 0.2 \
      --out "$out/${CARD}_hopper_decode_variants.json" ;;
  figures)
    peers=(--fa3 "${FA3:?the path of its library}" --rounds 9)
    part peers "$python" -m fagen bench --suite peers --peers cudnn,fa3 "${peers[@]}" --host --min-time 0.35 \
      --out benchmarks/${CARD}_peers.json --markdown "$out/peers.md"
    part masks "$python" -m fagen bench --suite masks --peers fa3,flex "${peers[@]}" --min-time 0.3 \
      --out benchmarks/${CARD}_masks.json --markdown "$out/masks.md"
    part backward "$python" -m fagen bench --suite peers --op backward --peers cudnn,fa3 "${peers[@]}" --min-time 0.35 \
      --out benchmarks/${CARD}_backward.json --markdown "$out/backward.md"
    for part in peers masks backward; do cp benchmarks/${CARD}_$part.json "$out/"; done
    cut -c 1-200 "$out/peers.md" "$out/masks.md" ;;
  *) echo "unknown piece $piece" >&2; exit 2 ;;
esac
