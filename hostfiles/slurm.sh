#!/bin/sh
# Under SLURM no hostfile is needed: `--hosts slurm` takes the nodes of the allocation, and of each node a rank for every
# task (--ntasks-per-node), or else for every GPU of the job. Nodes need not be alike. zinf reaches them over SSH, so this
# script runs once, on the first node.
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --exclusive

# Two minutes before the time limit zinf is warned. It ends after its step, with a checkpoint where the recipe sets
# checkpoint.interval, and the same script submitted again goes on from it. By hand: scancel --batch --signal=USR1 JOB
# (a plain scancel ends the ranks at once, without a checkpoint).
#SBATCH --signal=B:USR1@120

# The warning goes to this script's own process alone, so zinf has to take its place: `exec`.
exec zinf launch "$1" --hosts slurm
