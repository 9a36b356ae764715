#!/bin/sh
# Fuzzes every target for a third of SECONDS, from the clone's root, after `make asan`: with libFuzzer where a clang++
# has it, else, or where the last argument is `driver`, with the driver in build/asan. Corpora and failing inputs are in
# build/fuzz.
#   sh runtime/fuzz/run.sh SECONDS PYTHON CMAKE NINJA [driver]
set -eu
each=$(($1 / 3))
python=$2 cmake=$3 ninja=$4 with=${5:-libfuzzer}
root=$(pwd)
work=$root/build/fuzz
mkdir -p "$work/corpus/checkpoint" "$work/failures"
"$python" -m tests.fuzz_corpus "$work/corpus"
for target in program checkpoint npz; do
  "$root/build/asan/fuzz/fuzz_$target" --write-seeds "$work/corpus/$target"
done

probe='extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }'
if [ "$with" != driver ] && echo "$probe" | clang++ -x c++ -fsanitize=fuzzer,address -o "$work/probe" - 2>"$work/probe.log"; then
  "$cmake" -S runtime -B "$work/clang" -G Ninja -DCMAKE_MAKE_PROGRAM="$ninja" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++ -DPOCKC_SANITIZE=ON -DPOCKC_LIBFUZZER=ON
  "$cmake" --build "$work/clang" --target fuzz_program fuzz_checkpoint fuzz_npz
  for target in program checkpoint npz; do
    mkdir -p "$work/found/$target"
    "$work/clang/fuzz/fuzz_$target" -max_total_time=$each -max_len=262144 -timeout=60 -print_final_stats=1 \
      -artifact_prefix="$work/failures/$target-" "$work/found/$target" "$work/corpus/$target"
  done
else
  [ "$with" = driver ] || echo "There is no clang++ with libFuzzer here (Debian: apt-get install clang): fuzzing with the driver, which knows no coverage." >&2
  cd "$work/failures"
  for target in program checkpoint npz; do
    # Another seed each time: the one of `make test` is 1.
    "$root/build/asan/fuzz/fuzz_$target" --seconds $each --seed "$(date +%s)" "$work/corpus/$target"
  done
fi
