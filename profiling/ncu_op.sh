#!/usr/bin/env bash
# Hardware counters of one op with Nsight Compute.
#   profiling/ncu_op.sh FILE.safetensors [REPORT]     a captured call (see docs/profiling.md)
# The clocks are left as they are: the run is compared with ceilings of the same machine, not with a data sheet.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,3s/^# \{0,1\}//p' "$0" >&2; exit 2; }
command -v ncu >/dev/null || { echo "ncu is not on PATH: it comes with Nsight Compute (CUDA toolkit)" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
file=$1
report=${2:-$(basename "${file%.safetensors}")}
# --profile opens the profiler for one warm call: neither its copies nor the reference are recorded.
exec ncu --set full --clock-control none --profile-from-start off \
    --force-overwrite --export "$report" "${PYTHON:-python}" "$here/replay.py" "$file" --device cuda --profile
