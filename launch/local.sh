#!/usr/bin/env bash
# Starts several sdjax processes on this machine, as a small pod: for tests, or one process per GPU.
#
#   local.sh --processes 2 [--devices-each 4] [--port 8482] [--dry-run] -- --config=... --workdir=...
#
#   --devices-each   fake CPU devices per process (leave it away on real accelerators)
#   --gpus           process i sees GPU i only
#   --python         interpreter (default: python3 on PATH)
#
# Lines of process i begin with [i]. Ctrl-C and SIGTERM reach all of them; the exit code is the first
# failure, which 75 ("the same command goes on") only is when nothing worse was seen.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"

processes=2 devices_each='' port='' gpus=0 python=python3 args=()
while (($#)); do
  case $1 in
  --processes) take processes "$@" && shift 2 ;;
  --devices-each) take devices_each "$@" && shift 2 ;;
  --port) take port "$@" && shift 2 ;;
  --python) take python "$@" && shift 2 ;;
  --gpus) gpus=1 && shift ;;
  --dry-run) DRY_RUN=1 && shift ;;
  -h | --help) usage && exit 0 ;;
  --) shift && args=("$@") && break ;;
  *) die "unknown argument $1: see $(basename "$0") --help" ;;
  esac
done
port=${port:-$((20000 + RANDOM % 20000))}
need_value --processes "$processes" '[1-9][0-9]?' 'a number of processes from 1 to 99'
need_value --devices-each "${devices_each:-1}" '[1-9][0-9]?' 'a number of devices'
need_value --port "$port" '[1-9][0-9]{3,4}' 'a port number'
((${#args[@]})) || die 'no arguments for sdjax: give them after --, for example -- --config=configs/tiny.py'
need_tool "$python" 'name the interpreter with --python'

one() { # INDEX: the process with that number
  local vars=("JAX_COORDINATOR_ADDRESS=localhost:$port" "JAX_NUM_PROCESSES=$processes" "JAX_PROCESS_ID=$1")
  ((!gpus)) || vars+=("CUDA_VISIBLE_DEVICES=$1")
  if [[ -n $devices_each ]]; then
    vars+=(JAX_PLATFORMS=cpu
      "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices_each")
  fi
  run env "${vars[@]}" "$python" -u -m sdjax.main "${args[@]}"
}

if ((DRY_RUN)); then
  for ((i = 0; i < processes; i++)); do one "$i"; done
  exit 0
fi

cd "$(dirname "$here")"
# Every process reports its exit code here; the prefixing sed stands between it and us.
codes=$(mktemp -d)
pids=()
# shellcheck disable=SC2329  # the traps below call it
stop_all() {
  local file
  for file in "$codes"/*.pid; do
    [[ ! -f $file ]] || kill -TERM "$(<"$file")" 2>/dev/null || true
  done
}
trap stop_all TERM INT
trap 'rm -rf "$codes"' EXIT
for ((i = 0; i < processes; i++)); do
  {
    # `exec` in `one` is not possible through `run`, so the shell that becomes it leaves its pid.
    code=0
    (
      echo "$BASHPID" >"$codes/$i.pid"
      run() { exec "$@"; }
      one "$i"
    ) 2>&1 || code=$?
    echo "$code" >"$codes/$i.code"
  } | sed -u "s/^/[$i] /" &
  pids+=($!)
done
for pid in "${pids[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
done
worst=0
for ((i = 0; i < processes; i++)); do
  code=$(<"$codes/$i.code")
  if ((code != 0 && (worst == 0 || worst == 75))); then worst=$code; fi
done
exit "$worst"
