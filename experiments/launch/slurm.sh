#!/usr/bin/env bash
# Slurm, a process a GPU; JAX finds out by itself who and where they are:
#
#     sbatch --nodes=4 experiments/launch/slurm.sh CONFIG [--FIELD VALUE ...]
#
# The folder of the runs ($RUNS, by default ./runs) has to be the same for all nodes. Three minutes before the time limit
# all processes save and stop with exit code 75, and the job is put back into the queue; so it is after the loss of a
# node (--requeue). What is started again goes on from the last checkpoint.
#
#SBATCH --job-name=jaxmp
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#
# As many tasks on a node as it has GPUs: JAX gives task n of a node the GPU n. So not --gpus-per-task, under which each
# task sees one GPU, number 0.
set -uo pipefail

# The processes end by themselves where one of them has, each with its reason: Slurm need not kill them.
srun --kill-on-bad-exit=0 jaxmp train "$@" --workdir "${RUNS:-runs}" --distributed
code=$?

if [[ $code -eq 75 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
