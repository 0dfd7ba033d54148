#!/bin/sh
# Under SLURM no hostfile is needed: `--hosts slurm` takes the nodes of the allocation, and of each node a rank for every
# task (--ntasks-per-node), or else for every GPU of the job. Nodes need not be alike. zinf reaches them over SSH, so this
# script runs once, on the first node.
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --exclusive

exec zinf launch "$1" --hosts slurm
