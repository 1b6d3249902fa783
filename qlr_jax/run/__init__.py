"""The work folder of a job, its status and log, and its processes."""
