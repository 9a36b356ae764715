#!/bin/sh
# Fuzzes every target for a third of SECONDS, from the clone's root: with Clang's libFuzzer, which it builds here in
# minutes, or with the driver in build/asan, after `make asan`. Corpora and failing inputs are in build/fuzz.
#   sh runtime/fuzz/run.sh SECONDS PYTHON CMAKE NINJA libfuzzer|driver
set -eu
each=$(($1 / 3))
python=$2 cmake=$3 ninja=$4 with=$5
root=$(pwd)
work=$root/build/fuzz
targets="program checkpoint npz"
mkdir -p "$work/corpus/checkpoint" "$work/failures"

if [ "$with" = libfuzzer ]; then
  programs=$work/clang/fuzz
  "$cmake" -S runtime -B "$work/clang" -G Ninja -DCMAKE_MAKE_PROGRAM="$ninja" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++ -DPOCKC_SANITIZE=ON -DPOCKC_LIBFUZZER=ON
  "$cmake" --build "$work/clang" --target fuzz_program fuzz_checkpoint fuzz_npz
else
  echo "Fuzzing with the driver, which knows no coverage (libFuzzer comes with Clang: apt-get install clang)." >&2
  programs=$root/build/asan/fuzz
fi

"$python" -m tests.fuzz_corpus "$work/corpus"
for target in $targets; do
  "$programs/fuzz_$target" --write-seeds "$work/corpus/$target"
done

cd "$work/failures"
for target in $targets; do
  if [ "$with" = libfuzzer ]; then
    mkdir -p "$work/found/$target"
    "$programs/fuzz_$target" -max_total_time=$each -max_len=262144 -timeout=60 -print_final_stats=1 \
      -artifact_prefix="$work/failures/$target-" "$work/found/$target" "$work/corpus/$target"
  else
    # Another seed each time: the one of `make test` is 1.
    "$programs/fuzz_$target" --seconds $each --seed "$(date +%s)" "$work/corpus/$target"
  fi
done
