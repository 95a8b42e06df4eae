#!/usr/bin/env bash
# One process per node on Slurm; JAX asks Slurm for the coordinator and the numbers.
#
#   sbatch --nodes=4 scripts/slurm.sh --config configs/diffrate_vitb.py --config.data.dir=/data/tfds
#
# The workdir must be on a file system that all nodes share. Slurm sends SIGTERM before the time is
# up: the run saves, ends with status 0, and goes on when it is submitted again.
#SBATCH --job-name=vitcomp_jax
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -euo pipefail
# Slurm runs a copy of this file, so that the checkout is where the job was submitted from.
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
exec srun --kill-on-bad-exit=1 python -m vitcomp_jax.main --distributed "$@"
