#!/usr/bin/env bash
# Runs sdjax on TPUs of Google Kubernetes Engine through xpk (pip install xpk).
#
#   gke_xpk.sh create --name CLUSTER --zone Z --tpu-type v5p-128 --project P [--slices N] [--spot]
#   gke_xpk.sh run    --name CLUSTER --zone Z --tpu-type T --project P --workload W \
#                     [--slices N] [--restarts 20] [--image BASE] -- --config=... --workdir=gs://...
#   gke_xpk.sh logs   --name CLUSTER --zone Z --project P --workload W
#   gke_xpk.sh list   --name CLUSTER --zone Z --project P
#   gke_xpk.sh stop   --name CLUSTER --zone Z --project P --workload W
#   gke_xpk.sh delete --name CLUSTER --zone Z --project P
#
# `run` builds an image from this checkout on BASE (default python:3.12-slim) and lets the cluster
# start it again after a pre-emption, up to --restarts times; the workdir resumes. --dry-run prints.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"

name='' zone='' project='' tpu_type='' workload='' slices=1 restarts=20 spot=0 image=python:3.12-slim
args=()

parse() {
  while (($#)); do
    case $1 in
    --name) take name "$@" && shift 2 ;;
    --zone) take zone "$@" && shift 2 ;;
    --project) take project "$@" && shift 2 ;;
    --tpu-type) take tpu_type "$@" && shift 2 ;;
    --workload) take workload "$@" && shift 2 ;;
    --slices) take slices "$@" && shift 2 ;;
    --restarts) take restarts "$@" && shift 2 ;;
    --image) take image "$@" && shift 2 ;;
    --spot) spot=1 && shift ;;
    --dry-run) DRY_RUN=1 && shift ;;
    -h | --help) usage && exit 0 ;;
    --) shift && args=("$@") && break ;;
    *) die "unknown argument $1: see $(basename "$0") --help" ;;
    esac
  done
  need_value --name "$name" "$NAME_PATTERN" "$NAME_WHAT"
  need_value --zone "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z]' 'a zone such as us-east5-a'
  need_value --project "$project" '[a-z][-a-z0-9:.]{4,60}' 'a Google Cloud project'
  need_value --slices "$slices" '[1-9][0-9]*' 'a number of slices'
  need_value --restarts "$restarts" '[0-9]+' 'a number'
  need_tool xpk 'pip install xpk'
  where=(--cluster "$name" --zone "$zone" --project "$project")
}

need_type() {
  need_value --tpu-type "$tpu_type" '(v4|v5litepod|v5p|v6e)-[0-9]+|tpu7x-[0-9x]+' \
    'a slice such as v5litepod-16, v5p-128 or v6e-256'
}

need_workload() {
  need_value --workload "$workload" "$NAME_PATTERN" "$NAME_WHAT"
}

create() {
  need_type
  local flags=(--on-demand)
  ((!spot)) || flags=(--spot)
  run xpk cluster create "${where[@]}" --tpu-type "$tpu_type" --num-slices "$slices" "${flags[@]}"
}

start() {
  need_type
  need_workload
  ((${#args[@]})) || die 'no arguments for sdjax: give them after --, for example -- --config=configs/sdpo_qwen.py'
  has --workdir=gs:// "${args[@]}" ||
    die '--workdir=gs://BUCKET/RUN is missing after --: containers keep nothing'
  run xpk workload create "${where[@]}" --workload "$workload" --tpu-type "$tpu_type" \
    --num-slices "$slices" --max-restarts "$restarts" --base-docker-image "$image" \
    --script-dir "$(dirname "$here")" \
    --command "pip install --quiet --editable '.[tpu]' && exec python -u -m sdjax.main $(quote "${args[@]}")"
}

logs() {
  need_workload
  need_tool kubectl 'gcloud components install kubectl'
  run kubectl logs --follow --tail=200 --prefix --max-log-requests=64 \
    --selector "jobset.sigs.k8s.io/jobset-name=$workload"
}

list() { run xpk workload list "${where[@]}"; }

stop() {
  need_workload
  run xpk workload delete "${where[@]}" --workload "$workload"
}

delete() { run xpk cluster delete "${where[@]}"; }

command=${1-}
(($#)) && shift
case $command in
create | logs | list | stop | delete) parse "$@"; "$command" ;;
run) parse "$@"; start ;;
'' | -h | --help) usage ;;
*) die "unknown command $command: one of create, run, logs, list, stop, delete" ;;
esac
