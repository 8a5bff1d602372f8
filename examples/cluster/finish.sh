# finish PID: wait for a background process whatever signals come meanwhile, and return its exit code.
#
# `wait` alone returns early when a trap runs, and with 127 for a process whose code it has told before.
finish() {
    local code last
    wait "$1"
    code=$?
    while kill -0 "$1" 2>/dev/null; do
        wait "$1"
        code=$?
    done
    wait "$1" 2>/dev/null
    last=$?
    [ "$last" -eq 127 ] || code=$last
    return "$code"
}
