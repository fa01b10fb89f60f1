"""The one thread in which a process group's collectives run in order, and the work handles it gives."""
