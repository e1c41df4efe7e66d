#!/usr/bin/env bash
# One machine, several processes:
#
#     experiments/launch/local.sh PROCESSES CONFIG [--FIELD VALUE ...]
#
# One process drives all GPUs of a machine, and `jaxmp train` alone is then all it takes. This is for a machine where
# each GPU shall have a process of its own, as it has under Slurm; and to try on one machine, without any GPU, what many
# will do: XLA_FLAGS=--xla_force_host_platform_device_count=4 experiments/launch/local.sh 2 digits_mlp
#
# Ctrl-C and SIGTERM save and stop all. The exit code is the highest of all processes'.
set -uo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 PROCESSES CONFIG [--FIELD VALUE ...]" >&2
    exit 2
fi
count=$1
shift
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

processes=()
trap 'kill -TERM "${processes[@]}" 2>/dev/null' TERM INT
for ((index = 0; index < count; index++)); do
    # Of the GPUs, each process gets the one with its own number.
    JAX_LOCAL_DEVICE_IDS=$index jaxmp train "$@" --distributed \
        --coordinator "127.0.0.1:$port" --process-count "$count" --process-index "$index" &
    processes+=($!)
done

highest=0
for process in "${processes[@]}"; do
    wait "$process"
    code=$?
    while kill -0 "$process" 2>/dev/null; do # a signal ends `wait`, not the process
        wait "$process"
        code=$?
    done
    highest=$((code > highest ? code : highest))
done
exit "$highest"
