#!/usr/bin/env bash
# Run a command on the device that does nothing: run.sh FOLDER COMMAND... ; FOLDER is what build.sh made.
set -euo pipefail
folder=$(cd "$1" && pwd)
shift
export LD_LIBRARY_PATH="$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" TRITON_LIBCUDA_PATH="$folder"
export NULLGPU_CC="${NULLGPU_CC:-90}"
exec env LD_PRELOAD="$folder/libcuda.so.1" "$@"
