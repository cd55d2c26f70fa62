#!/usr/bin/env bash
# Draw .github/crash.svg, the moving picture at the top of the README, from a real recording: a run
# is killed in its third step, and the same command goes on there.
#
#     bash .github/movie.sh
#
# It needs uv and npm, which fetch asciinema and svg-term-cli. The recording happens in a temporary
# folder, with none of this machine's settings.
set -euo pipefail
project=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp "$project"/*.py "$project/pyproject.toml" "$folder"
cd "$folder"
uv sync --quiet
cat > screen.sh <<'SCREEN'
show() {
  printf '\033[1m$ %s\033[0m\n' "$1"
  sleep 1
  eval "$1" | sed -u -E 's/(restored)/\x1b[32m\1\x1b[0m/; s/(now SIGKILL)/\x1b[31m\1\x1b[0m/'
}
uv() { .venv/bin/python "${@:2}"; } # without uv's look for changes, which takes a moment
show 'uv run agent.py "Acme" --crash' 2>/dev/null
sleep 2
show 'uv run agent.py "Acme"'
sleep 5
printf ' ' # so that the recording holds the last screen
SCREEN
uvx --quiet asciinema rec --quiet --cols 80 --rows 38 --idle-time-limit 5 \
  -c "env -i PATH='$PATH' HOME='$folder' TERM=xterm-256color LANG=C.UTF-8 bash screen.sh" movie.cast
npm exec --yes --package svg-term-cli -- \
  svg-term --in movie.cast --out crash.svg --width 80 --height 38 --no-cursor --window
# Where nothing moves, show the last screen instead of the first, which is empty.
last=$(grep -o 'translateX(-[0-9]*px)' crash.svg | tail -n 1)
sed -i "s/<style>/<style>g[style*=animation]{transform:$last}@media(prefers-reduced-motion){g[style*=animation]{animation:none!important}}/" crash.svg
cp crash.svg "$project/.github/crash.svg"
wc -c "$project/.github/crash.svg"
