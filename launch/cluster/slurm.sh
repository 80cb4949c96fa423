#!/bin/bash
# Training on several machines under SLURM, one process a machine with all its GPUs:
#
#   sbatch launch/cluster/slurm.sh --config=configs/tiny.py:ar --workdir=/shared/runs/ar \
#     --config.io.checkpoint=/shared/runs/vae/params
#
# Submit it from the root of the repository. Everything after the file goes to launch.train. The
# workdir must be on a file system that all machines share.

#SBATCH --job-name=longlive
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

# --signal: two minutes before the time is up, and when the job is preempted, the processes get
# SIGTERM. They save after the step that is being computed and end with 143, and the job goes back to
# the queue; the next start goes on from there.

# JAX takes one GPU a process under SLURM unless it is told which.
export JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))

srun --kill-on-bad-exit=1 .venv/bin/python -m launch.train --distributed "$@"
code=$?

if [ $code -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
