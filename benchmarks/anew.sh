#!/usr/bin/env bash
# A change of templates, and new families, on a Hopper card, in pieces of some minutes each:
#   anew.sh check_new OUT   tests/gpu of the newer families, and of dropout; what failed in OUT/failed
#   anew.sh check OUT       the rest of them but for check_forward's, the older families; generated/ verified
#   anew.sh tune OUT      tuning_db/ tuned for problems/hopper.toml; BUDGET (515s), GPUS=all for all of the machine
#   anew.sh tune_backward OUT   the same for problems/hopper_backward.toml
#   anew.sh few_rows OUT  keys that blocks share: tests, winners, ${CARD}_few_rows.json; FA3 as below
#   anew.sh large_d OUT   head dims above 256: tests, winners, ${CARD}_large_d.json, and ${CARD}_odd_d.json where FA3 is set
#   anew.sh large_d_backward OUT   their gradients: tests, winners, ${CARD}_large_d_backward.json
#   anew.sh mla OUT       latent decode: tests, ${CARD}_mla.json, its knobs against each other
#   anew.sh sm90_decode OUT   prompts among tokens, wide heads: tests, ${CARD}_mixed.json, its knobs; FA3 where it is set
#   anew.sh training OUT  steps of training and what belongs to them, ${CARD}_*.json; FA3; ROUNDS (3), LEAST (0.04 s a row)
#   anew.sh figures OUT   ${CARD}_peers.json and ${CARD}_masks.json; FA3: the path of FlashAttention 3's library
# The checkout is changed; OUT gets copies and logs. Each piece ends after SECONDS_AT_MOST (570), with what it has.
set -u
piece=${1:?a piece, as above} out=${2:?folder for copies and logs} python=${PYTHON:-python3}
end=$(( $(date +%s) + ${SECONDS_AT_MOST:-570} ))
mkdir -p "$out"

part() {  # NAME COMMAND...: as long as there is time, and LIMIT seconds where it is set; its last lines are shown
  local name=$1 left=$(( end - $(date +%s) )); shift
  [ "${LIMIT:-$left}" -gt "$left" ] || left=${LIMIT:-$left}
  timeout -s INT $(( left > 5 ? left : 5 )) "$@" > "$out/$name.log" 2>&1
  echo "== $name: exit $?, $(( end - $(date +%s) )) s left"
  tail -n 12 "$out/$name.log" | cut -c 1-300
}

tests() {  # NAME WHAT...: compiled by all cores at once; which failed is known however it ends
  local flags=(-v -p no:cacheprovider)
  "$python" -c 'import xdist' 2>/dev/null && flags+=(-n "${WORKERS:-$(nproc)}" --dist load)
  part "$1" "$python" -m pytest "${flags[@]}" "${@:2}"
  grep -hE '(^| )(FAILED|ERROR)( |$)' "$out/$1.log" | sort -u >> "$out/failed"
}

case $piece in
  check_new)
    gpu=tests/gpu/test
    LIMIT=110 tests fp8 ${gpu}_sm90_forward_fp8.py
    LIMIT=110 tests decode ${gpu}_sm90_decode.py ${gpu}_sm90_decode_mla.py
    LIMIT=110 tests large ${gpu}_sm90_forward_large.py
    LIMIT=110 tests fp32_backward ${gpu}_sm80_backward_fp32.py
    tests dropout tests/gpu -k dropout
    cat "$out/failed" ;;
  check)  # what has changed most since it last ran comes first
    tests gradients tests/gpu/test_gradients_cuda.py tests/gpu/test_packed_cuda.py tests/gpu/test_sinks_cuda.py \
      tests/gpu/test_torch_impl_cuda.py tests/gpu/test_op_cuda.py tests/gpu/test_trust_cuda.py
    tests decode tests/gpu/test_sm80_decode.py tests/gpu/test_kvcache_cuda.py
    tests simt tests/gpu/test_simt_softmax.py tests/gpu/test_simt_forward.py tests/gpu/test_simt_backward.py \
      tests/gpu/test_sm80_forward_fp32.py
    part generated "$python" -m fagen.cli.generated verify
    cp generated/manifest.json "$out/"
    WORKERS=1 tests measure tests/gpu/test_measure_cuda.py tests/gpu/test_ablation_cuda.py
    WORKERS=4 tests sanitizer tests/gpu/test_sanitizer.py
    tests sm90_backward tests/gpu/test_sm90_backward.py
    cat "$out/failed" ;;
  check_forward)
    tests sm90 tests/gpu/test_sm90_forward.py
    tests sm80 tests/gpu/test_sm80_forward.py
    tests sm80_backward tests/gpu/test_sm80_backward.py
    cat "$out/failed" ;;
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
    tests split tests/gpu/test_sm90_forward.py tests/gpu/test_sm80_forward.py -k "split or parts"
    # shellcheck disable=SC2086
    part tune "$python" -m fagen tune --problems benchmarks/problems/few_rows.toml --family sm90_forward \
      --budget "${BUDGET:-240s}" ${GPUS:+--gpus $GPUS} --out tuning_db
    tar -C tuning_db -cJf "$out/sm_90.tar.xz" sm_90
    part rows "$python" -m fagen bench --suite few_rows --peers cudnn,fa3 --fa3 "${FA3:?the path of its library}" \
      --rounds 9 --out benchmarks/${CARD}_few_rows.json --markdown "$out/few_rows.md"
    cp benchmarks/${CARD}_few_rows.json "$out/" ;;
  sm90_decode)
    tests tests tests/gpu/test_sm90_decode.py
    part rows "$python" -m fagen bench --op decode --suite mixed --family sm90_decode --peers "${FA3:+fa3,}flashinfer" \
      ${FA3:+--fa3 "$FA3"} --rounds 9 --min-time 0.3 --out benchmarks/${CARD}_mixed.json --markdown "$out/mixed.md"
    part render "$python" benchmarks/variants.py render now benchmarks/problems/sm90_decode_variants.txt --target sm_90 \
      --family sm90_decode --out "$out/sm90_decode_variants.json"
    part knobs "$python" benchmarks/variants.py time "$out/sm90_decode_variants.json" --min-time 0.2 \
      --out "$out/${CARD}_sm90_decode_variants.json"
    cp benchmarks/${CARD}_mixed.json "$out/" ;;
  large_d)
    tests large tests/gpu/test_sm90_forward_large.py
    # shellcheck disable=SC2086
    part tune "$python" -m fagen tune --problems benchmarks/problems/large_d.toml --family sm90_forward_large \
      --budget "${BUDGET:-240s}" ${GPUS:+--gpus $GPUS} --out tuning_db
    tar -C tuning_db -cJf "$out/sm_90.tar.xz" sm_90
    part rows "$python" -m fagen bench --suite large-d --peers cudnn,efficient,math,ffpa --rounds 5 \
      --out benchmarks/${CARD}_large_d.json --markdown "$out/large_d.md"
    [ -z "${FA3:-}" ] || part odd "$python" -m fagen bench --suite odd-d --peers fa3 --fa3 "$FA3" --rounds 5 \
      --out benchmarks/${CARD}_odd_d.json --markdown "$out/odd_d.md"
    cp benchmarks/${CARD}_large_d.json benchmarks/${CARD}_odd_d.json "$out/" ;;
  large_d_backward)
    tests large tests/gpu/test_sm90_backward_large.py
    # shellcheck disable=SC2086
    part tune "$python" -m fagen tune --problems benchmarks/problems/large_d_backward.toml --family sm90_backward_large \
      --budget "${BUDGET:-240s}" ${GPUS:+--gpus $GPUS} --out tuning_db
    tar -C tuning_db -cJf "$out/sm_90.tar.xz" sm_90
    part rows "$python" -m fagen bench --suite large-d --op backward --family sm90_backward_large \
      --peers efficient,math,ffpa --rounds 5 --out benchmarks/${CARD}_large_d_backward.json \
      --markdown "$out/large_d_backward.md"
    cp benchmarks/${CARD}_large_d_backward.json "$out/" ;;
  mla)
    tests tests tests/gpu/test_sm90_decode_mla.py
    part rows "$python" -m fagen bench --op decode --suite mla --family sm90_decode_mla --peers flash_mla,flashinfer \
      --rounds 9 --min-time 0.3 --out benchmarks/${CARD}_mla.json --markdown "$out/mla.md"
    part render "$python" benchmarks/variants.py render mla benchmarks/problems/mla_variants.txt --target sm_90 \
      --family sm90_decode_mla --out "$out/variants.json"
    part knobs "$python" benchmarks/variants.py time "$out/variants.json" --min-time 0.2 \
      --out "$out/${CARD}_mla_variants.json"
    cp benchmarks/${CARD}_mla.json "$out/" ;;
  training)  # name of the result, op, suite, peers, and what else; FlexAttention compiles for each row
    bench() {
      part "$1" "$python" -m fagen bench --op "$2" --suite "$3" --peers "$4" --fa3 "${FA3:?the path of its library}" \
        --rounds "${ROUNDS:-3}" --min-time "${LEAST:-0.04}" \
        --out "benchmarks/${CARD}_$1.json" --markdown "$out/$1.md" "${@:5}"
      cp "benchmarks/${CARD}_$1.json" "$out/"
    }
    bench training training training cudnn,fa2,fa3
    bench deterministic backward deterministic plain,fa3
    bench varlen_forward forward varlen fa3
    bench varlen_backward backward varlen fa3
    bench dropout training dropout plain,fa2
    bench documents_backward backward documents fa3
    bench documents_forward forward documents fa3
    bench ampere_backward backward ampere fa2 --family sm80_backward
    bench varlen training varlen fa3
    bench documents_flex backward documents flex --filter 'h16/16' ;;
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
