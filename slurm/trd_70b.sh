#!/usr/bin/env bash
# TRD on a 70B student that is its own teacher: conf/experiment/trd_70b.yaml on eight nodes of eight
# GPUs, four of them for training and two each for the servers of student and teacher.
#
#   sbatch slurm/trd_70b.sh model.student.path=/models/Llama-3.3-70B-Instruct train.num_steps=500
#   STUDENT_SERVER_NODES=4 sbatch --nodes=10 --time=12:00:00 slurm/trd_70b.sh precision=fp8
#
# Arguments are settings (Hydra overrides), options of sbatch override the lines below, and every
# variable below can be set in the environment. docs/cluster.md has all of them.
#SBATCH --job-name=trd_70b
#SBATCH --nodes=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@900         # seconds left for the step that is under way and a checkpoint
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

RECIPE=${RECIPE:-trd_70b}                          # conf/experiment/RECIPE.yaml
RUN_DIR=${RUN_DIR:-$SLURM_SUBMIT_DIR/runs/$RECIPE} # on a file system that all nodes share
STUDENT_SERVER_NODES=${STUDENT_SERVER_NODES:-2}
TEACHER_SERVER_NODES=${TEACHER_SERVER_NODES:-2}    # all other nodes train

# Slurm runs a copy of this file; Command is where it came from, and may be followed by arguments.
script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p')
until [[ -f $script || $script != *" "* ]]; do script=${script% *}; done
NEMO_TRD_HOME=${NEMO_TRD_HOME:-$(dirname "$(dirname "$script")")}
# shellcheck source-path=SCRIPTDIR source=lib/job.sh
source "$NEMO_TRD_HOME/slurm/lib/job.sh"
run_job "$@"
