#!/bin/sh
# A whole line in one container: up, until the container is stopped. Arguments are those of jobs.up.
set -eu
trap 'python -m jobs.down; exit 0' TERM INT
python -m jobs.up "$@" &
wait $!
# Waiting for a child, not sleeping, so that a signal is answered at once.
while :; do sleep 3600 & wait $!; done
