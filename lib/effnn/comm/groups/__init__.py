"""The process groups "ccl" and "mpi4py": torch.distributed over oneCCL and over MPI."""
