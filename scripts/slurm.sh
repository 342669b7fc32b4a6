#!/usr/bin/env bash
# vapr train on several nodes of a SLURM cluster, one process a GPU. From the environment in which vapr is installed:
#
#   sbatch --nodes 2 --gpus-per-node 8 scripts/slurm.sh run.yaml --set parallel.engine=deepspeed --set parallel.zero=2
#
# Everything after the script's name goes to vapr train. The run's folder, the data and the model must lie where all nodes
# see them. A job that SLURM starts again (a node failed, or it was preempted) goes on from the newest checkpoint; after a
# time limit, submit it again with --resume.
#SBATCH --job-name=vapr
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=vapr-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@180
set -euo pipefail
[ $# -gt 0 ] || {
    echo "Error: slurm.sh: which config? Write: sbatch scripts/slurm.sh run.yaml" >&2
    exit 2
}
# Three minutes before the time limit SLURM sends SIGTERM. torchrun passes it on, and vapr saves a checkpoint and leaves;
# torchrun waits 30 seconds for that.
vapr=$(command -v vapr) || {
    echo "Error: slurm.sh: vapr is not on PATH; activate its environment before sbatch, or in this script" >&2
    exit 2
}
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [[ " $* " != *" --resume "* ]]; then
    set -- "$@" --resume
fi
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${hosts%%$'\n'*}
gpus=${SLURM_GPUS_ON_NODE:-1}
cores=${SLURM_CPUS_PER_TASK:-$gpus}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > gpus ? cores / gpus : 1))}

# One torchrun a node starts the processes there; they find one another at the first node. The port is the job's own, so
# that two jobs on a node do not meet. A node that fails takes the others with it instead of leaving them waiting.
exec srun --ntasks-per-node=1 --cpus-per-task="$cores" --kill-on-bad-exit=1 \
    torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "$gpus" --max_restarts 0 \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$first:$((20000 + SLURM_JOB_ID % 20000))" \
    "$vapr" train "$@"
