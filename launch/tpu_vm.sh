#!/usr/bin/env bash
# Runs sdjax on plain Cloud TPU VMs, one host or a whole pod, without Kubernetes or Pathways.
#
#   tpu_vm.sh create    --name N --zone Z --accelerator v5p-128 [--spot] [--version RUNTIME]
#   tpu_vm.sh bootstrap --name N --zone Z [--source DIR]          copy the checkout, install on all
#   tpu_vm.sh run       --name N --zone Z -- --config=configs/sdpo_qwen.py --workdir=gs://B/run
#   tpu_vm.sh logs      --name N --zone Z [--worker 0|all]        follow the log
#   tpu_vm.sh status    --name N --zone Z                         the request's state, who runs
#   tpu_vm.sh stop      --name N --zone Z                         SIGTERM: saves, then ends
#   tpu_vm.sh delete    --name N --zone Z
#   tpu_vm.sh watch     --name N --zone Z --accelerator A [--spot] -- ARGS...
#                       create, bootstrap, run; when the slice is pre-empted or the run dies, again
#
# Every command takes --project P and --dry-run (print, do nothing). `run` on an existing workdir
# resumes it. All hosts must start together: `run` starts them all, sdjax names those that do not
# come. `watch` ends when the run ends by itself (exit 0), refuses its input, is stopped by `stop`, or
# has failed RETRIES times (--retries, 20); started beside a run that goes on, it joins it.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"

readonly REMOTE_DIR=sdjax
readonly POLL_S=${SDJAX_POLL_S:-60}

parse() {
  name='' zone='' project='' accelerator='' version='' worker=0 spot=0 retries=20
  source_dir=$(dirname "$here") args=()
  while (($#)); do
    case $1 in
    --name) take name "$@" && shift 2 ;;
    --zone) take zone "$@" && shift 2 ;;
    --project) take project "$@" && shift 2 ;;
    --accelerator) take accelerator "$@" && shift 2 ;;
    --version) take version "$@" && shift 2 ;;
    --worker) take worker "$@" && shift 2 ;;
    --source) take source_dir "$@" && shift 2 ;;
    --retries) take retries "$@" && shift 2 ;;
    --spot) spot=1 && shift ;;
    --dry-run) DRY_RUN=1 && shift ;;
    -h | --help) usage && exit 0 ;;
    --) shift && args=("$@") && break ;;
    *) die "unknown argument $1: see $(basename "$0") --help" ;;
    esac
  done
  need_value --name "$name" "$NAME_PATTERN" "$NAME_WHAT"
  need_value --zone "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z]' 'a zone such as us-east5-a'
  need_value --worker "$worker" 'all|[0-9]+' 'a worker number or all'
  need_value --retries "$retries" '[0-9]+' 'a number'
  need_tool gcloud 'install the Google Cloud SDK and run gcloud auth login'
  where=(--zone "$zone")
  [[ -z $project ]] || where+=(--project "$project")
}

need_accelerator() {
  [[ $accelerator != tpu7x* ]] || die 'tpu7x is rented through Kubernetes only: use launch/gke_xpk.sh'
  need_value --accelerator "$accelerator" '(v4|v5litepod|v5p|v6e)-[0-9]+' \
    'a slice such as v4-32, v5litepod-16, v5p-128 or v6e-256'
}

need_args() {
  ((${#args[@]})) || die 'no arguments for sdjax: give them after --, for example -- --config=configs/sdpo_qwen.py'
  has --workdir=gs:// "${args[@]}" || has --workdir=/ "${args[@]}" ||
    die '--workdir is missing after --: a pod needs one that all hosts reach, such as --workdir=gs://BUCKET/RUN'
}

default_version() {
  case $1 in
  v4-*) echo tpu-ubuntu2204-base ;;
  v5litepod-*) echo v2-alpha-tpuv5-lite ;;
  v5p-*) echo v2-alpha-tpuv5 ;;
  v6e-*) echo v2-alpha-tpuv6e ;;
  esac
}

on_workers() { # WORKER COMMAND: over ssh
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"
}

create() {
  need_accelerator
  local flags=()
  ((!spot)) || flags+=(--spot)
  run gcloud compute tpus queued-resources create "$name" "${where[@]}" --node-id "$name" \
    --accelerator-type "$accelerator" \
    --runtime-version "${version:-$(default_version "$accelerator")}" "${flags[@]}"
}

state() { # the queued resource's state, or NONE
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
    --format='value(state.state)' 2>/dev/null || echo NONE
}

wait_active() { # until the slice is there; 1 when it never will be
  ((!DRY_RUN)) || return 0
  local now
  while true; do
    now=$(state)
    case $now in
    ACTIVE) return 0 ;;
    FAILED | SUSPENDED | SUSPENDING | NONE | DELETING) return 1 ;;
    esac
    echo "$name is $now; looking again in $POLL_S s"
    sleep "$POLL_S"
  done
}

bootstrap() {
  [[ -f $source_dir/setup.py ]] || die "--source=$source_dir holds no setup.py: give the checkout of sdjax"
  local archive
  archive=$(mktemp -t sdjax-XXXXXX.tar.gz)
  # shellcheck disable=SC2064  # the name is known now
  trap "rm -f '$archive'" RETURN
  # neither environments nor caches nor results; './.*' is .git, .venv and the like
  run tar --exclude='./.*' --exclude=__pycache__ --exclude='*.egg-info' --exclude=./build \
    --exclude=./runs --exclude=./workdir \
    -czf "$archive" -C "$source_dir" . &&
    run gcloud compute tpus tpu-vm scp "$archive" "$name:$REMOTE_DIR.tar.gz" "${where[@]}" \
      --worker=all &&
    on_workers all "rm -rf $REMOTE_DIR && mkdir $REMOTE_DIR && tar -xzf $REMOTE_DIR.tar.gz -C $REMOTE_DIR && bash $REMOTE_DIR/launch/bootstrap.sh --extra tpu"
}

start() { # detached, on every worker at the same time
  need_args
  on_workers all "bash $REMOTE_DIR/launch/host.sh start -- $(quote "${args[@]}")"
}

logs() { on_workers "$worker" "bash $REMOTE_DIR/launch/host.sh logs"; }

status() {
  ((DRY_RUN)) || echo "$name: $(state)"
  on_workers all "bash $REMOTE_DIR/launch/host.sh status"
}

stop() { on_workers all "bash $REMOTE_DIR/launch/host.sh stop"; }

delete() {
  run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

run_status() { # what host.sh says on worker 0; nothing when ssh cannot get there
  gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=0 \
    --command="bash $REMOTE_DIR/launch/host.sh status" 2>/dev/null || true
}

await_end() { # 0: ended well; 1: refused its input; 2: the slice was lost or a process died; 3: stopped
  ((!DRY_RUN)) || return 0
  local silent=0
  while [[ $(state) == ACTIVE ]]; do
    case $(run_status) in
    running) silent=0 ;;
    'ended 0') return 0 ;;
    'ended 2') return 1 ;;
    stopped) return 3 ;;
    '') ((++silent < 5)) || return 2 ;; # the network may fail for a moment
    *) return 2 ;;
    esac
    sleep "$POLL_S"
  done
  return 2
}

start_or_join() { # a run that goes on already is watched, not started twice
  if ((!DRY_RUN && !fresh)) && [[ $(run_status) == running ]]; then
    echo 'a run is going on already'
  else
    start
  fi
}

provide() { # a slice with sdjax on it, unless it is there already; fresh says which
  fresh=0
  ((DRY_RUN)) || [[ $(state) != ACTIVE ]] || return 0
  ((DRY_RUN)) || [[ $(state) == NONE ]] || delete
  fresh=1
  create && wait_active && bootstrap
}

watch() {
  need_accelerator
  need_args
  local attempt outcome
  for ((attempt = 1; attempt <= retries; attempt++)); do
    echo "attempt $attempt of $retries"
    outcome=2
    if provide && start_or_join; then
      outcome=0
      await_end || outcome=$?
    fi
    case $outcome in
    0) echo "the run has ended by itself after $attempt attempt(s)" && return 0 ;;
    1) die "the run refused its input: see tpu_vm.sh logs --name $name --zone $zone" ;;
    3) echo 'the run was stopped by host.sh stop: its state is saved' && return 0 ;;
    esac
    echo 'the slice was lost or the run died: starting again from the last checkpoint'
    ((DRY_RUN)) || sleep "$POLL_S"
  done
  die "gave up after $retries attempts: see tpu_vm.sh logs, or raise --retries"
}

command=${1-}
(($#)) && shift
case $command in
create | bootstrap | logs | status | stop | delete | watch) parse "$@"; "$command" ;;
run) parse "$@"; start ;;
'' | -h | --help) usage ;;
*) die "unknown command $command: one of create, bootstrap, run, logs, status, stop, delete, watch" ;;
esac
