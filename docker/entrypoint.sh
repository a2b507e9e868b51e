#!/bin/bash
# What `docker run IMAGE ...` starts: `train model.path=...` is launch/train.py, `smoke` tries the image out, and
# anything else (python, torchrun, bash) runs as it is.
set -euo pipefail
root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
name=${1:-}
if [[ $name == smoke ]]; then
  exec python "$root/docker/smoke.py" "${@:2}"
elif [[ $name =~ ^[a-z]+$ && -f $root/launch/$name.py ]]; then
  exec python "$root/launch/$name.py" "${@:2}"
elif [[ -z $name ]]; then
  commands=$(cd "$root/launch" && grep -l '__main__' -- *.py | sed 's/\.py$//' | tr '\n' ' ')
  echo "error: no command; expected one of ${commands}smoke, or a program such as python or torchrun" >&2
  exit 2
fi
exec "$@"
