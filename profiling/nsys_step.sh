#!/usr/bin/env bash
# Timeline of a stretch of a run with Nsight Systems.
#   profiling/nsys_step.sh REPORT DELAY_S DURATION_S -- train --config NAME [section.key=value ...]
# Then: nsys export --type sqlite REPORT.nsys-rep; python profiling/trace.py REPORT.sqlite
# DELAY_S skips loading and compilation. The ranges of the NVTX domain `geoalign` name the phases of an iteration.
set -euo pipefail
usage() { sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -ge 5 ] && [ "$4" = -- ] || usage
command -v nsys >/dev/null || {
    echo "nsys is not on PATH: install Nsight Systems (the package nsight-systems-cli of NVIDIA's apt or dnf repository," \
        "or nsight-systems of a CUDA toolkit), or use \`geoalign train --profile N\`, which needs neither" >&2
    exit 2
}
report=$1 delay=$2 duration=$3
shift 4
exec nsys profile --trace cuda,nvtx,osrt --sample none --delay "$delay" --duration "$duration" --kill none \
    --force-overwrite true --output "$report" "${PYTHON:-python}" -m geoalign "$@"
