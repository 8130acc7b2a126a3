#!/usr/bin/env bash
# Starts, stops and looks after one sdjax process on this host; the pod scripts call it over ssh.
#
#   host.sh start [--dry-run] -- --config=... --workdir=...    in the background, survives the ssh
#   host.sh stop                                               SIGTERM: saves, then ends
#   host.sh status                                running | ended CODE | stopped | not started
#   host.sh logs                                               follow the log
#
# Keeps pid, exit code and log in SDJAX_RUN_DIR (default ~/sdjax-run); uses the Python of SDJAX_ENV
# (default ~/sdjax-env, made by bootstrap.sh); reads secrets such as HF_TOKEN from ~/.sdjax.env.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"

run_dir=${SDJAX_RUN_DIR:-$HOME/sdjax-run}
python=${SDJAX_ENV:-$HOME/sdjax-env}/bin/python

alive() { [[ -f $run_dir/pid ]] && kill -0 "$(<"$run_dir/pid")" 2>/dev/null; }

start() {
  if [[ ${1-} == --dry-run ]]; then DRY_RUN=1 && shift; fi
  [[ ${1-} == -- ]] || die 'give the arguments of sdjax after --'
  shift
  ! alive || die "a run is already going on here (pid $(<"$run_dir/pid")): stop it first"
  if ((DRY_RUN)); then
    run "$python" -u -m sdjax.main "$@"
    return
  fi
  [[ -x $python ]] || die "$python is missing: run launch/bootstrap.sh on this host first"
  mkdir -p "$run_dir"
  rm -f "$run_dir/exit" "$run_dir/pid" "$run_dir/stopped"
  setsid nohup "${BASH_SOURCE[0]}" _supervise "$@" >>"$run_dir/log" 2>&1 </dev/null &
  for _ in {1..50}; do # so that a stop that follows at once finds the pid
    [[ -f $run_dir/pid || -f $run_dir/exit ]] && break
    sleep 0.1
  done
  echo "started on $(hostname); log in $run_dir/log"
}

_supervise() { # in its own session: the process, and its exit code in a file
  # shellcheck disable=SC1091  # the user's own file
  [[ ! -f $HOME/.sdjax.env ]] || { set -a && source "$HOME/.sdjax.env" && set +a; }
  cd "$(dirname "$here")"
  "$python" -u -m sdjax.main "$@" &
  echo $! >"$run_dir/pid"
  local code=0
  wait $! || code=$?
  echo "$code" >"$run_dir/exit"
}

stop() { # leaves a mark: a run that was asked to end is not to be started again
  alive || return 0
  touch "$run_dir/stopped"
  kill -TERM "$(<"$run_dir/pid")"
}

status() {
  if alive; then
    echo running
  elif [[ -f $run_dir/exit && -f $run_dir/stopped ]]; then
    echo stopped
  elif [[ -f $run_dir/exit ]]; then
    echo "ended $(<"$run_dir/exit")"
  else
    echo 'not started'
  fi
}

logs() {
  [[ -f $run_dir/log ]] || die "there is no log in $run_dir yet: start a run first"
  tail -n 200 -F "$run_dir/log"
}

command=${1-}
(($#)) && shift
case $command in
start | stop | status | logs | _supervise) "$command" "$@" ;;
'' | -h | --help) usage ;;
*) die "unknown command $command: one of start, stop, status, logs" ;;
esac
