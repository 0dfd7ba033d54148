#!/bin/sh
# sbatch hostfiles/slurm.sh my.yaml [KEY=VALUE ...]
#
# Under Slurm no hostfile is needed: `--hosts slurm` takes the nodes of the job, and of each node a rank for every task
# (--ntasks-per-node), or else for every GPU of the job. Nodes need not be alike. This script runs once, on the first
# node, and zinf starts what it needs on all of them by srun. `--ssh` does so by SSH.
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --exclusive

# Where a node fails, Slurm puts the job into its queue again, and zinf goes on from the last checkpoint.
#SBATCH --requeue

# Two minutes before the time limit zinf is warned. It ends after its step, with a checkpoint where the recipe sets
# checkpoint.interval, and the same script submitted again goes on from it. `scancel`, `scontrol requeue` and the time
# limit itself do the same, but kill what has not ended after KillWait (30 s, unless your cluster sets another).
#SBATCH --signal=B:USR1@120

# These signals go to this script's own process, so zinf has to take its place: `exec`. A shell would end, or hand
# nothing on, and zinf would be killed without a checkpoint.
exec zinf launch "$@" --hosts slurm
