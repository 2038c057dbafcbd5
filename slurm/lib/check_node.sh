#!/usr/bin/env bash
# check_node.sh MARK MOUNTS NEEDED...: what this node lacks, in one line. Job.sh runs it on each node.
# MARK is a file that the first node has just made; MOUNTS is FROM:TO[:FLAGS],...; NEEDED are programs
# and files.
set -euo pipefail

mark=$1 mounts=$2
shift 2

fail() {
    echo "$(hostname): $1"
    exit 1
}

for _ in {1..20}; do # a file system of many nodes may show a new file late
    [[ -e $mark ]] && break
    sleep 0.5
done
[[ -e $mark ]] || fail "RUN_DIR is not shared: $mark, made on the first node, is not here. \
Fix: RUN_DIR=... on a file system that all nodes mount."

IFS=, read -ra pairs <<< "$mounts"
for pair in "${pairs[@]}"; do
    [[ -e ${pair%%:*} ]] || fail "the mount ${pair%%:*} of CONTAINER_MOUNTS does not exist. \
Fix: mount what this node has."
done

for needed; do
    [[ -e $needed ]] || command -v "$needed" > /dev/null || fail "$needed is not there. \
Fix: give a path that every node has, in PYTHON, CONTAINER_IMAGE or SERVER_CONTAINER_IMAGE."
done
