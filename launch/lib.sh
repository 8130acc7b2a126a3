# Shared by the launch scripts: messages, input checks, dry runs. Sourced, not executed.
# shellcheck shell=bash disable=SC2034

DRY_RUN=0

die() { # one sentence, then stop
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 2
}

run() { # runs a command, or prints it under --dry-run
  if ((DRY_RUN)); then
    printf '+'
    printf ' %q' "$@"
    printf '\n'
  else
    "$@"
  fi
}

usage() { # the comment block at the top of the script
  awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"
}

need_tool() { # NAME HINT: the command must exist, except in a dry run
  ((DRY_RUN)) || command -v "$1" >/dev/null || die "$1 is not on PATH: $2"
}

need_value() { # FLAG VALUE PATTERN WHAT
  [[ -n $2 ]] || die "$1 is missing: give $4"
  [[ $2 =~ ^($3)$ ]] || die "$1=$2 is not $4"
}

take() { # VARIABLE FLAG VALUE...: stores a flag's value, which must not be another flag
  local -n target=$1
  [[ -n ${3-} && $3 != --* ]] || die "$2 needs a value: give one after it"
  target=$3
}

has() { # PREFIX ARGUMENT...: whether one of the arguments begins so
  local argument
  for argument in "${@:2}"; do
    [[ $argument != "$1"* ]] || return 0
  done
  return 1
}

quote() { # arguments as one string that a shell reads back the same
  local text
  printf -v text '%q ' "$@"
  printf '%s' "${text% }"
}

readonly NAME_PATTERN='[a-z]([-a-z0-9]{0,38}[a-z0-9])?'
readonly NAME_WHAT='a name of at most 40 small letters, digits and dashes that begins with a letter'
