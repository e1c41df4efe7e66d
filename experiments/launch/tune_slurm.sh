#!/usr/bin/env bash
# Slurm, a study of many trials: every element of the array is a worker on one GPU, and all work on one study:
#
#     sbatch --array=0-15 experiments/launch/tune_slurm.sh CONFIG --space LEAF=log:LOW:HIGH ... --trials 200
#
# The folder of the runs ($RUNS, by default ./runs) has to be the same for all nodes, on a file system whose locks reach
# all of them (NFS 4, Lustre mounted with -o flock): they tell a worker that works from one that died. Without such locks,
# give a database: --storage postgresql+psycopg://user@host/name --heartbeat 60.
#
# Three minutes before the time limit a worker saves its run and stops with exit code 75, and is put back into the queue;
# so it is after the loss of its node (--requeue). Whoever comes next goes on with that trial, from its checkpoint.
#
#SBATCH --job-name=jaxmp-tune
#SBATCH --array=0-7
#SBATCH --gpus-per-node=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

srun jaxmp tune "$@" --workdir "${RUNS:-runs}" --jobs 1
code=$?

if [[ $code -eq 75 ]]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit "$code"
