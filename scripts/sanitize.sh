#!/bin/sh
# The native kernels, and the op of TensorFlow, under AddressSanitizer with UndefinedBehaviorSanitizer, then under ThreadSanitizer.
# All instruction sets that this machine runs. Usage: scripts/sanitize.sh [build directory]
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
build=${1:-$root/build/sanitize}
mkdir -p "$build"

for sanitizers in address,undefined thread; do
  echo "== $sanitizers"
  cmake -S "$root" -B "$build/$sanitizers" -DADAFACTOR_TESTS=ON -DADAFACTOR_SANITIZE="$sanitizers" \
    -DCMAKE_BUILD_TYPE=RelWithDebInfo >"$build/log" 2>&1 || { cat "$build/log"; exit 1; }
  cmake --build "$build/$sanitizers" --parallel --target test_native test_tensorflow
  for program in test_native test_tensorflow; do
    ASAN_OPTIONS=detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1 \
      "$build/$sanitizers/$program"
  done
done
