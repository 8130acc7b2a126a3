#!/usr/bin/env bash
# Prepares one host: its own Python by uv (TPU images ship 3.10, sdjax needs 3.11), sdjax, folders.
#
#   bootstrap.sh [--extra tpu|cuda|test] [--python 3.12] [--source DIR] [--env DIR] [--dry-run]
#
#   --extra    what to install beside the CPU basis (default tpu)
#   --python   Python version for uv to bring (default 3.12)
#   --source   checkout of sdjax on this host (default: the one that holds this script)
#   --env      virtual environment to create or update (default ~/sdjax-env)
#
# Safe to run again: it updates what is there. launch/tpu_vm.sh bootstrap runs it on all workers.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"

extra=tpu python=3.12 source_dir=$(dirname "$here") env_dir=$HOME/sdjax-env
while (($#)); do
  case $1 in
  --extra) take extra "$@" && shift 2 ;;
  --python) take python "$@" && shift 2 ;;
  --source) take source_dir "$@" && shift 2 ;;
  --env) take env_dir "$@" && shift 2 ;;
  --dry-run) DRY_RUN=1 && shift ;;
  -h | --help) usage && exit 0 ;;
  *) die "unknown argument $1: see $(basename "$0") --help" ;;
  esac
done
need_value --extra "$extra" 'tpu|cuda|test' 'tpu, cuda or test'
need_value --python "$python" '3\.1[1-9]' 'a Python version from 3.11 on, such as 3.12'
[[ -f $source_dir/setup.py ]] || die "--source=$source_dir holds no setup.py: give the checkout of sdjax"

export PATH=$HOME/.local/bin:$PATH
if ! command -v uv >/dev/null; then
  # From the package index, so that no installer script is piped into a shell.
  run python3 -m pip install --user --quiet uv
fi
run uv venv --quiet --allow-existing --python "$python" "$env_dir"
run uv pip install --quiet --python "$env_dir/bin/python" --editable "${source_dir}[$extra]"
run "$env_dir/bin/python" -m sdjax.main --config.mode=doctor
