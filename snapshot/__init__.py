"""In-memory copies owned by a process that outlives the ranks."""
