#!/usr/bin/env bash
# Build libcuda.so.1, the device that does nothing, for a CUDA build of torch: build.sh SITE_PACKAGES FOLDER
set -euo pipefail
site=$1 to=$2 here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$to"
for part in runtime driver libraries; do
  g++ -std=c++17 -O1 -fPIC -w -I"$site/triton/backends/nvidia/include" -I"$site/nvidia/cu13/include" \
    -I"$site/nvidia/cudnn/include" -c "$here/$part.cpp" -o "$to/$part.o"
done

# Every other entry point that torch's libraries ask for, or the driver's and Triton's tables name, answers 0.
{
  for l in libc10_cuda libtorch_cuda libtorch_cuda_linalg libtorch_python libtorch_cpu libcaffe2_nvrtc; do
    nm -D "$site/torch/lib/$l.so" | awk '$1 == "U" {print $2}'
  done
  strings "$site/torch/lib/libc10_cuda.so" | grep -E '^cu[A-Z][A-Za-z0-9_]+$'
  grep -oE '\bcu[A-Z][A-Za-z0-9]+\b' "$site/triton/backends/nvidia/driver.c"
  printf '%s\n' cuDevicePrimaryCtxRelease_v2 cuMemAlloc_v2 cuMemFree_v2 cuCtxGetApiVersion
} | sed 's/@.*//' | grep -E '^(__cuda|cuda|cu[A-Z]|cublas|cudnn|nccl)' | grep -vE '^(cuFile|cuda_)' | sort -u > "$to/asked"
nm --defined-only "$to"/{runtime,driver,libraries}.o | awk 'NF == 3 {print $3}' | sort -u > "$to/have"
grep -vxF -f "$to/have" "$to/asked" > "$to/rest" || true
{
  echo '#include <cstdio>'
  echo '#include <cstdlib>'
  echo 'static void note(const char* name, int& once) {'
  echo '  if (!once++ && getenv("NULLGPU_VERBOSE")) fprintf(stderr, "nullgpu: %s answers 0\n", name);'
  echo '}'
  echo 'extern "C" {'
  while read -r name; do echo "long $name() { static int once; note(\"$name\", once); return 0; }"; done < "$to/rest"
  echo '}'
} > "$to/rest.cpp"
g++ -O1 -fPIC -w -c "$to/rest.cpp" -o "$to/rest.o"
g++ -shared -o "$to/libcuda.so.1" -Wl,-soname,libcuda.so.1 "$to"/{runtime,driver,libraries,rest}.o -ldl -lpthread
ln -sf libcuda.so.1 "$to/libcuda.so"
echo "built $to/libcuda.so.1: $(grep -c . "$to/rest") entry points answer 0"
