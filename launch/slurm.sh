#!/usr/bin/env bash
# Submits a run to SLURM: one process per GPU node (or per GPU), started again after a requeue.
#
#   slurm.sh run    --nodes 4 --gpus 8 [--per-gpu] [--partition P] [--account A] [--time 24:00:00]
#                   [--name sdjax] [--env ~/sdjax-env] [--restarts 20] -- --config=... --workdir=/shared/run
#   slurm.sh logs   --name sdjax                          follow the newest log of that name
#   slurm.sh stop   --name sdjax                          SIGTERM: saves, then ends
#
# Two minutes before the time limit the run gets SIGTERM and saves, and the job is requeued until
# sdjax ends by itself; so it is when a process died (at most --restarts times in all), but not when
# sdjax refused its input. --dry-run prints the job script. Logs: sdjax-NAME-JOB.log here.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"

name=sdjax nodes=1 gpus=8 per_gpu=0 partition='' account='' time_limit=24:00:00 restarts=20
env_dir=${SDJAX_ENV:-$HOME/sdjax-env} args=()

parse() {
  while (($#)); do
    case $1 in
    --name) take name "$@" && shift 2 ;;
    --nodes) take nodes "$@" && shift 2 ;;
    --gpus) take gpus "$@" && shift 2 ;;
    --per-gpu) per_gpu=1 && shift ;;
    --partition) take partition "$@" && shift 2 ;;
    --account) take account "$@" && shift 2 ;;
    --time) take time_limit "$@" && shift 2 ;;
    --env) take env_dir "$@" && shift 2 ;;
    --restarts) take restarts "$@" && shift 2 ;;
    --dry-run) DRY_RUN=1 && shift ;;
    -h | --help) usage && exit 0 ;;
    --) shift && args=("$@") && break ;;
    *) die "unknown argument $1: see $(basename "$0") --help" ;;
    esac
  done
  need_value --name "$name" "$NAME_PATTERN" "$NAME_WHAT"
  need_value --nodes "$nodes" '[1-9][0-9]*' 'a number of nodes'
  need_value --gpus "$gpus" '[1-9][0-9]?' 'a number of GPUs per node'
  need_value --restarts "$restarts" '[0-9]+' 'a number'
  need_value --time "$time_limit" '([0-9]+-)?[0-9]{1,2}:[0-9]{2}:[0-9]{2}' 'a time such as 24:00:00'
}

job_script() {
  local tasks=1
  ((!per_gpu)) || tasks=$gpus
  printf '#!/usr/bin/env bash\n'
  printf '#SBATCH %s\n' "--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$tasks" \
    "--gpus-per-node=$gpus" "--time=$time_limit" --requeue --open-mode=append \
    "--output=sdjax-$name-%j.log" --signal=B:USR1@120
  [[ -z $partition ]] || printf '#SBATCH --partition=%s\n' "$partition"
  [[ -z $account ]] || printf '#SBATCH --account=%s\n' "$account"
  cat <<SCRIPT
cd $(quote "$(dirname "$here")")
timed_out=0
stopped=0
trap 'timed_out=1; kill -TERM "\$srun_pid"' USR1
trap 'stopped=1; kill -TERM "\$srun_pid"' TERM
srun --kill-on-bad-exit=0 $(quote "$env_dir/bin/python" -u -m sdjax.main "${args[@]}") &
srun_pid=\$!
code=0
wait "\$srun_pid" || code=\$?
# A trapped signal ends the first wait early.
if ((timed_out || stopped)); then code=0; wait "\$srun_pid" || code=\$?; fi
# 75: stopped by a signal, or another process died; from 128 on: a process died by a signal (srun
# returns the greatest code of all). The same command resumes. A stop asked for is final.
again=\$((code == 75 || code >= 128))
if ((again && !stopped && \${SLURM_RESTART_COUNT:-0} < $restarts)); then
  scontrol requeue "\$SLURM_JOB_ID"
else
  exit "\$code"
fi
SCRIPT
}

start() {
  ((${#args[@]})) || die 'no arguments for sdjax: give them after --, for example -- --config=configs/sdpo_qwen.py'
  has --workdir= "${args[@]}" ||
    die '--workdir is missing after --: give a folder that all nodes share'
  need_tool sbatch 'run this on a login node of the cluster'
  if ((DRY_RUN)); then
    job_script
  else
    job_script | sbatch
  fi
}

logs() {
  local newest
  # shellcheck disable=SC2012  # our own file names, sorted by age
  newest=$(ls -t "sdjax-$name-"*.log 2>/dev/null | head -n 1) || true
  [[ -n $newest ]] || die "there is no log sdjax-$name-*.log in this folder: give --name, or change folder"
  run tail -n 200 -F "$newest"
}

stop() {
  need_tool scancel 'run this on a login node of the cluster'
  run scancel --batch --signal=TERM --name="$name"
}

command=${1-}
(($#)) && shift
case $command in
run) parse "$@"; start ;;
logs | stop) parse "$@"; "$command" ;;
'' | -h | --help) usage ;;
*) die "unknown command $command: one of run, logs, stop" ;;
esac
